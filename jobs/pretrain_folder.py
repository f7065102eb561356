r"""A backbone for your own pictures: image classification of labelled shards.

    python jobs/pretrain_folder.py --labels shards/labelled --backbone.name resnet18
    python jobs/larvseg_folder.py ... --backbone.name resnet18 \
        --backbone.pretrained runs/pretrain_folder/backbone.safetensors

An image with several labels counts for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larvseg_folder import SMOKE_CLASSES

from memseg_dist.config import LaunchConfig, OptimizerConfig, RunConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.models.backbone import BackboneConfig
from memseg_dist.runtime.jobs import Job, main, save_trained_backbone


@dataclass(frozen=True)
class PretrainFolder(Job):
    """Image classification of your own pictures."""

    labels: tuple[str, ...] = ("shards/labelled",)
    """Shards whose image labels are learned."""
    crop: int = 224
    """Side of the training crops in pixels; the shortest side of a picture is scaled to it."""

    def config(self) -> RunConfig:
        augment = AugmentConfig(crop=self.crop, resize=(4 * self.crop, self.crop))
        return RunConfig(
            name="pretrain_folder",
            storage="runs",
            sources=tuple(
                Source(f"labels_{number}", path, "labels", 2, 16, augment)
                for number, path in enumerate(self.labels)
            ),
            method=ClassifyConfig(),
            backbone=BackboneConfig("resnet18", drop_path=0.0, output_stride=8),
            steps=5_000,
            optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05),
            launch=LaunchConfig(workers=(1, 2)),
        )

    def vocabularies(self) -> Mapping[str, Vocabulary]:
        return {f"labels_{number}": SMOKE_CLASSES for number in range(len(self.labels))}

    def finish(
        self, config: RunConfig, result: Mapping[str, Any], stages: Mapping[str, RunConfig]
    ) -> None:
        path = Path(config.directory, "backbone.safetensors")
        save_trained_backbone(config, result["checkpoint"], path)
        print(f"backbone    {path}")


if __name__ == "__main__":
    main(PretrainFolder, __doc__)
