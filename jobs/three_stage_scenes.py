"""Three-stage self-training on the generated scenes: masks of a few of 2,400, and all pictures.

    python datasets/scenes.py --root data/scenes
    python jobs/pretrain_scenes.py                                  # the backbone of all runs
    memseg data split data/scenes/masks 1/16 1/4 --rule every-class
    python jobs/three_stage_scenes.py --split 1_16-seed0
    python jobs/three_stage_scenes.py --split 1_16-seed0 --recipe supervised  # or self-training

The masks of the base classes are learned and scored; pixels of the others are unknown. Scores:
docs/results.md; over splits and variants: benchmarks/study_semi.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scenes_setup import AUGMENT, BACKBONE, FEW_STEPS, ScenesOptions
from three_stage_recipes import FAST_DECAYS, ThreeStageOptions, three_stages

from memseg_dist.config import LaunchConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage

METHOD = ThreeStageConfig(rates=(1, 2, 3), decays=FAST_DECAYS)
"""Dilations that fit maps of 12 x 12 positions."""


@dataclass(frozen=True)
class Options(ScenesOptions, ThreeStageOptions):
    """Three-stage self-training on the generated scenes."""

    launch: LaunchConfig = LaunchConfig(workers=2)


def stages(options: Options) -> dict[str, Stage]:
    labelled = Source("few", options.masks, "masks", 1, 8, AUGMENT, exclude=options.novel,
                      split=options.split)  # fmt: skip
    everything = replace(labelled, name="all", supervision="none", split=None)
    run = options.run(
        options.name_of("three_stage", "scenes"),
        sources=(labelled, everything),
        method=METHOD,
        backbone=replace(BACKBONE, pretrained=options.backbone),
        validation=options.validation,
        **FEW_STEPS,
    )
    return three_stages(options, run, first=labelled, truth=options.masks)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return options.vocabularies("few", "all")


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
