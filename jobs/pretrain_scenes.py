"""A backbone for the scenes: image classification of single objects, as all the papers start from.

    python datasets/scenes.py --root data/scenes
    python jobs/pretrain_scenes.py        # writes runs/pretrain_scenes/backbone.safetensors

Cost: about two minutes on two CPU cores. Expected: 9 of 10 training pictures right (measured in a
sketch of this run; see docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larvseg_scenes import AUGMENT, BACKBONE, draw_scenes

from memseg_dist.config import Intervals, LaunchConfig, LoaderConfig, OptimizerConfig, RunConfig
from memseg_dist.data.loader import Source
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.runtime.jobs import Job, main, save_trained_backbone


@dataclass(frozen=True)
class PretrainScenes(Job):
    """Image classification of the scenes' objects."""

    data: str = "data/scenes"
    """Folder that datasets/scenes.py wrote."""

    def config(self) -> RunConfig:
        return RunConfig(
            name="pretrain_scenes",
            storage="runs",
            sources=(Source("objects", f"{self.data}/objects", "labels", 2, 16, AUGMENT),),
            method=ClassifyConfig(),
            backbone=BACKBONE,
            steps=1200,
            optimizer=OptimizerConfig("adamw", lr=2e-3, weight_decay=0.05, warmup_steps=50),
            launch=LaunchConfig(workers=2),
            loader=LoaderConfig(processes=1),
            every=Intervals(log=25, checkpoint=600),
        )

    def draw(self, config: RunConfig) -> None:
        draw_scenes(config)

    def finish(
        self, config: RunConfig, result: Mapping[str, Any], stages: Mapping[str, RunConfig]
    ) -> None:
        path = Path(config.directory, "backbone.safetensors")
        save_trained_backbone(config, result["checkpoint"], path)
        print(f"backbone    {path}")


if __name__ == "__main__":
    main(PretrainScenes, __doc__)
