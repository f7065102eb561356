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

from dataclasses import dataclass
from pathlib import Path

from memseg_dist.config import (
    Intervals,
    LaunchConfig,
    LoaderConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.methods.larvseg import LarvSegConfig
from memseg_dist.models.backbone import BackboneConfig
from memseg_dist.runtime.jobs import Job, main, recipe

NUM_OBJECTS = 24
BACKBONE = BackboneConfig(
    "resnet18",
    output_stride=8,
    drop_path=0.0,
    options={"channels": "[32, 64, 96, 128]"},
)
"""1.1 M weights; 12 x 12 positions of 96-pixel scenes."""
AUGMENT = AugmentConfig(resize=(96, 96), scale_range=(1.0, 1.0), crop=96, photometric=False)
"""Flips alone: the scenes draw their own scales, colours and light."""


@dataclass(frozen=True)
class LarvSegScenes(Job):
    """LarvSeg on the generated scenes."""

    data: str = "data/scenes"
    """Folder that datasets/scenes.py wrote."""
    backbone: str = "runs/pretrain_scenes/backbone.safetensors"
    """Weights that jobs/pretrain_scenes.py wrote; '' for random ones."""
    baseline: bool = False
    """The paper's baseline: no memory, no attentive loss."""

    def config(self) -> RunConfig:
        base, novel = recipe("scenes").base_and_novel(NUM_OBJECTS)
        return RunConfig(
            name="baseline_scenes" if self.baseline else "larvseg_scenes",
            storage="runs",
            sources=(
                Source("masks", f"{self.data}/masks", "masks", 2, 8, AUGMENT),
                Source("weak", f"{self.data}/weak", "labels", 1, 8, AUGMENT),
                Source("objects", f"{self.data}/objects", "labels", 1, 8, AUGMENT),
            ),
            method=LarvSegConfig(
                attention="off" if self.baseline else "cross_image",
                cls_weight=0.4,
                aux_weight=0.4,
                top_k=6,
                distance_threshold=1.0,
            ),
            backbone=BackboneConfig(**{**vars(BACKBONE), "pretrained": self.backbone}),
            validation=ValidationConfig(
                f"{self.data}/val",
                mode="whole",
                resize=(96, 96),
                base=tuple(base),
                novel=tuple(novel),
            ),
            steps=800,
            optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.01, warmup_steps=30),
            launch=LaunchConfig(workers=2),
            loader=LoaderConfig(processes=1),
            every=Intervals(log=25, evaluate=400, checkpoint=400),
        )

    def draw(self, config: RunConfig) -> None:
        draw_scenes(config)


def draw_scenes(config: RunConfig) -> None:
    """A handful of scenes where a `--smoke` config looks for them."""
    scenes = recipe("scenes")
    root = Path(config.sources[0].path).parent
    scenes.build(scenes.Scenes(root, masks=16, weak=16, objects=32, val=4, processes=0))
    if config.validation is not None:
        (root / "val").rename(config.validation.path)


if __name__ == "__main__":
    main(LarvSegScenes, __doc__)
