"""PseudoSeg on the generated scenes: masks of a few of 2,400, and all of the pictures.

    python datasets/scenes.py --root data/scenes
    python jobs/pretrain_scenes.py                                  # the backbone of all runs
    memseg data split data/scenes/masks 1/16 1/4 --rule every-class
    python jobs/pseudoseg_scenes.py --split 1_16-seed0
    python jobs/pseudoseg_scenes.py --split 1_16-seed0 --recipe supervised    # or self-training

The masks of the base classes are learned and scored; pixels of the others are unknown. Scores:
docs/results.md; over splits and variants: benchmarks/study_semi.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pseudoseg_recipes import PseudoSegOptions, all_images, pseudoseg_stages
from scenes_setup import AUGMENT, BACKBONE, FEW_STEPS, ScenesOptions

from memseg_dist.config import LaunchConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.pseudoseg.config import PseudoSegConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage

METHOD = PseudoSegConfig(stages=(1, -2, -1), dim=64, attention_dim=32, rates=(2, 4, 6), warmup=0.2)
"""Narrow heads and dilations that fit maps of 12 x 12 positions."""


@dataclass(frozen=True)
class Options(ScenesOptions, PseudoSegOptions):
    """PseudoSeg on the generated scenes."""

    launch: LaunchConfig = LaunchConfig(workers=2)


def stages(options: Options) -> dict[str, Stage]:
    labelled = Source("few", options.masks, "masks", 1, 8, AUGMENT, labels_from="crop",
                      exclude=options.novel, split=options.split)  # fmt: skip
    everything = replace(labelled, name="all")
    run = options.run(
        options.name_of("pseudoseg", "scenes"),
        sources=(labelled, all_images(options, everything)),
        method=METHOD,
        backbone=replace(BACKBONE, pretrained=options.backbone),
        validation=options.validation,
        **FEW_STEPS,
    )
    return pseudoseg_stages(options, run, truth=options.masks)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return options.vocabularies("few", "all")


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
