"""LarvSeg on the generated scenes: the demo. Novel classes have image labels only.

    python datasets/scenes.py --root data/scenes
    python jobs/pretrain_scenes.py                                  # the backbone of both runs
    python jobs/larvseg_scenes.py --baseline
    python jobs/larvseg_scenes.py

Cost: minutes on two CPU cores, with two DeepSpeed workers on a local Ray cluster. Expected
scores: docs/results.md. A step is two slots of masks, one of scenes with image labels and one of
single objects, eight pictures each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scenes_setup import AUGMENT, BACKBONE, NUM_OBJECTS

from memseg_dist.config import (
    Intervals,
    LaunchConfig,
    LoaderConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.pipeline import JobOptions, main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import recipe


@dataclass(frozen=True)
class Options(JobOptions):
    """LarvSeg on the generated scenes."""

    data: str = "data/scenes"
    """Folder that datasets/scenes.py wrote."""
    backbone: str = "runs/pretrain_scenes/backbone.safetensors"
    """Weights that jobs/pretrain_scenes.py wrote; '' for random ones."""
    baseline: bool = False
    """The paper's baseline: no memory, no attentive loss."""


def stages(options: Options) -> dict[str, Stage]:
    data, (base, novel) = options.data, recipe("scenes").base_and_novel(NUM_OBJECTS)
    run = RunConfig(
        name="baseline_scenes" if options.baseline else "larvseg_scenes",
        storage="runs",
        sources=(
            Source("masks", f"{data}/masks", "masks", 2, 8, AUGMENT),
            Source("weak", f"{data}/weak", "labels", 1, 8, AUGMENT),
            Source("objects", f"{data}/objects", "labels", 1, 8, AUGMENT),
        ),
        method=LarvSegConfig(
            attention="off" if options.baseline else "cross_image",
            cls_weight=0.4,
            aux_weight=0.4,
            top_k=6,
            distance_threshold=1.0,
        ),
        backbone=replace(BACKBONE, pretrained=options.backbone),
        validation=ValidationConfig(
            f"{data}/val", mode="whole", resize=(96, 96), base=tuple(base), novel=tuple(novel)
        ),
        steps=800,
        optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.01, warmup_steps=30),
        launch=LaunchConfig(workers=2),
        loader=LoaderConfig(processes=1),
        every=Intervals(log=25, evaluate=400, checkpoint=400),
    )
    return {"train": run}


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    splits = {"masks": "masks", "weak": "weak", "objects": "objects", "validation": "val"}
    vocabulary = recipe("scenes").vocabulary
    return {name: vocabulary(split, NUM_OBJECTS) for name, split in splits.items()}


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
