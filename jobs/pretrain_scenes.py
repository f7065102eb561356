"""A backbone for the scenes: image classification of single objects, as all the papers start from.

    python datasets/scenes.py --root data/scenes
    python jobs/pretrain_scenes.py        # writes runs/pretrain_scenes/backbone.safetensors

Cost: about two minutes on two CPU cores. Expected: 9 of 10 training pictures right (measured in a
sketch of this run; see docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from scenes_setup import AUGMENT, BACKBONE, NUM_OBJECTS

from memseg_dist.config import Intervals, LaunchConfig, LoaderConfig, OptimizerConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.pipeline import PipelineOptions, main
from memseg_dist.stages import ExportConfig, Stage, result
from memseg_dist.tools.shipped import recipe


@dataclass(frozen=True)
class Options(PipelineOptions):
    """Image classification of the scenes' objects."""

    data: str = "data/scenes"
    """Folder that datasets/scenes.py wrote."""
    launch: LaunchConfig = LaunchConfig(workers=2)


def stages(options: Options) -> dict[str, Stage]:
    run = options.run(
        options.name or "pretrain_scenes",
        sources=(Source("objects", f"{options.data}/objects", "labels", 2, 16, AUGMENT),),
        method=ClassifyConfig(),
        backbone=BACKBONE,
        steps=1200,
        optimizer=OptimizerConfig("adamw", lr=2e-3, weight_decay=0.05, warmup_steps=50),
        loader=LoaderConfig(processes=1),
        every=Intervals(log=25, checkpoint=600),
    )
    return {
        "train": run,
        "export": ExportConfig(result("train"), result("train") + "/backbone.safetensors"),
    }


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return {"objects": recipe("scenes").vocabulary("objects", NUM_OBJECTS)}


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
