"""What the jobs on the generated scenes share."""

from __future__ import annotations

from memseg_dist.data.augment import AugmentConfig
from memseg_dist.nn.backbone import BackboneConfig

NUM_OBJECTS = 24
BACKBONE = BackboneConfig(
    "resnet18", output_stride=8, drop_path=0.0, options={"channels": "[32, 64, 96, 128]"}
)
"""1.1 M weights; 12 x 12 positions of 96-pixel scenes."""
AUGMENT = AugmentConfig(resize=(96, 96), scale_range=(1.0, 1.0), crop=96, photometric=False)
"""Flips alone: the scenes draw their own scales, colours and light."""
