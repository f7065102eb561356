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

OPTIMIZER = OptimizerConfig(
    "adamw", lr=1e-2, weight_decay=0.01, warmup_steps=30, backbone_lr_scale=0.1
)
"""Heads at ten times the rate of the pretrained backbone."""


@dataclass(frozen=True)
class ScenesOptions(JobOptions):
    """Where the scenes and the backbone lie."""

    data: str = "data/scenes"
    """Folder that datasets/scenes.py wrote."""
    backbone: str = "runs/pretrain_scenes/backbone.safetensors"
    """Weights that jobs/pretrain_scenes.py wrote; '' for random ones."""
    num_objects: int = NUM_OBJECTS
    """Object classes that datasets/scenes.py was given; every third of them is novel."""

    @property
    def masks(self) -> str:
        return f"{self.data}/masks"

    @property
    def novel(self) -> tuple[str, ...]:
        """Uids of the classes that no mask of the training scenes shows."""
        return tuple(recipe("scenes").base_and_novel(self.num_objects)[1])

    @property
    def validation(self) -> ValidationConfig:
        """Over the classes that masks teach."""
        path = f"{self.data}/val"
        return ValidationConfig(path, mode="whole", resize=(96, 96), exclude=self.novel)

    def vocabularies(self, *sources: str) -> dict[str, Vocabulary]:
        """Of these sources of masks, and of the validation."""
        vocabulary = recipe("scenes").vocabulary
        masks = dict.fromkeys(sources, vocabulary("masks", self.num_objects))
        return masks | {"validation": vocabulary("val", self.num_objects)}


FEW_STEPS: dict[str, Any] = {
    "steps": 600,
    "optimizer": OPTIMIZER,
    "loader": LoaderConfig(processes=1),
    "every": Intervals(log=25, evaluate=300, checkpoint=300),
}
"""A run of a few minutes on a pretrained backbone."""
