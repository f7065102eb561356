"""MCIBI on the generated scenes: any segmenter with and without context of the whole data set.

    python datasets/scenes.py --root data/scenes
    python jobs/pretrain_scenes.py                                  # the backbone of all runs
    python jobs/mcibi_scenes.py --method.memory off                 # FCN
    python jobs/mcibi_scenes.py
    python jobs/mcibi_scenes.py --method.context aspp --method.rates 2 4 6

The masks of the base classes are learned and scored; pixels of the others are unknown. Scores:
docs/results.md; over seeds, contexts and controls: benchmarks/study_mcibi.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scenes_setup import AUGMENT, BACKBONE, FEW_STEPS, ScenesOptions

from memseg_dist.config import LaunchConfig, RunConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage

METHOD = MCIBIConfig(dim=64, rates=(2, 4, 6), stages=(-2, -1), consistency_epochs=0.1)
"""Narrow heads, dilations that fit maps of 12 x 12 positions, and runs of a few epochs."""


@dataclass(frozen=True)
class Options(ScenesOptions):
    """MCIBI on the generated scenes."""


def stages(options: Options) -> dict[str, Stage]:
    run = RunConfig(
        name="mcibi_scenes",
        storage="runs",
        sources=(Source("masks", options.masks, "masks", 2, 8, AUGMENT, exclude=options.novel),),
        method=METHOD,
        backbone=replace(BACKBONE, pretrained=options.backbone),
        validation=options.validation,
        launch=LaunchConfig(workers=2),
        **FEW_STEPS,
    )
    return {"train": run}


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return options.vocabularies("masks")


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
