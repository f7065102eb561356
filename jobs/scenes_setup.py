"""What the jobs on the generated scenes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memseg_dist.config import Intervals, LoaderConfig, OptimizerConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import JobOptions
from memseg_dist.tools.shipped import recipe

NUM_OBJECTS = 24
BACKBONE = BackboneConfig(
    "resnet18", output_stride=8, drop_path=0.0, options={"channels": "[32, 64, 96, 128]"}
)
"""1.1 M weights; 12 x 12 positions of 96-pixel scenes."""
AUGMENT = AugmentConfig(resize=(96, 96), scale_range=(1.0, 1.0), crop=96, photometric=False)
"""Flips alone: the scenes draw their own scales, colours and light."""


@dataclass(frozen=True)
class ScenesOptions(JobOptions):
    """Where the scenes and the backbone lie."""

    data: str = "data/scenes"
    """Folder that datasets/scenes.py wrote."""
    backbone: str = "runs/pretrain_scenes/backbone.safetensors"
    """Weights that jobs/pretrain_scenes.py wrote; '' for random ones."""


def mask_vocabularies(*sources: str) -> dict[str, Vocabulary]:
    """Of these sources of masks, and of the validation."""
    vocabulary = recipe("scenes").vocabulary
    masks = dict.fromkeys(sources, vocabulary("masks", NUM_OBJECTS))
    return masks | {"validation": vocabulary("val", NUM_OBJECTS)}


def novel_classes() -> tuple[str, ...]:
    """Uids of the classes that no mask of the training scenes shows."""
    return tuple(recipe("scenes").base_and_novel(NUM_OBJECTS)[1])


def base_validation(data: str) -> ValidationConfig:
    """Of the scenes in the folder `data`, over the classes that masks teach."""
    novel = novel_classes()
    return ValidationConfig(f"{data}/val", mode="whole", resize=(96, 96), exclude=novel)


FEW_STEPS: dict[str, Any] = {
    "steps": 600,
    "optimizer": OptimizerConfig(
        "adamw", lr=1e-2, weight_decay=0.01, warmup_steps=30, backbone_lr_scale=0.1
    ),
    "loader": LoaderConfig(processes=1),
    "every": Intervals(log=25, evaluate=300, checkpoint=300),
}
"""A run of a few minutes on a pretrained backbone."""
