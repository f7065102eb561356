"""Small shards of coloured squares for the training tests: masks of two classes, labels of four."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from memseg_dist.config import (
    EngineConfig,
    Intervals,
    LaunchConfig,
    LoaderConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    ValidationConfig,
)
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.tools.shards import Sample, finish, write_shard

COLORS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])
CATEGORIES = tuple(
    Category(f"n{i}", name) for i, name in enumerate(["red", "green", "blue", "sun"])
)
SIZE = 32


def write_squares(root: Path, count: int, num_classes: int, *, with_masks: bool) -> Path:
    """`count` images, two classes side by side in each; shards of 8."""
    for shard in range(-(-count // 8)):
        samples = [
            _square(index, num_classes, with_masks)
            for index in range(8 * shard, min(8 * shard + 8, count))
        ]
        write_shard(root, shard, samples, num_classes=num_classes)
    finish(root, Vocabulary(CATEGORIES[:num_classes]))
    return root


def _square(index: int, num_classes: int, with_masks: bool) -> Sample:
    generator = np.random.default_rng(index)
    left, right = generator.permutation(num_classes)[:2]
    mask = np.full((SIZE, SIZE), left, dtype=np.uint16)
    mask[:, generator.integers(8, 24) :] = right
    noise = generator.integers(-30, 30, (SIZE, SIZE, 3))
    image = Image.fromarray((COLORS[mask] + noise).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "png")
    labels = tuple(sorted({int(left), int(right)}))
    return Sample(f"s{index:04d}", file.getvalue(), "png", labels, mask if with_masks else None)


def larvseg_config(root: Path, storage: Path, **changes) -> RunConfig:
    """LarvSeg with its bank on, dropout, DeepSpeed: 3 mask slots and 2 weak slots."""
    augment = AugmentConfig(resize=(32, 32), crop=SIZE, scale_range=(0.8, 1.5))
    options = {"depth": "2", "embed_dim": "16", "num_heads": "2", "patch_size": "8"}
    defaults = {
        "name": "run",
        "storage": str(storage),
        "sources": (
            Source("masks", str(root / "masks"), "masks", slots=3, augment=augment),
            Source("weak", str(root / "weak"), "labels", slots=2, augment=augment),
        ),
        "validation": ValidationConfig(
            str(root / "val"),
            mode="whole",
            resize=(32, 32),
            base=("n0", "n1"),
            novel=("n2", "n3"),
            num_panels=1,
        ),
        "method": LarvSegConfig(capacity=3, top_k=4, warm_up=1),
        "backbone": BackboneConfig("vit_tiny_patch16_224", image_size=SIZE, options=options),
        "optimizer": OptimizerConfig(lr=0.02, clip_norm=1.0),
        "engine": EngineConfig("deepspeed", zero_stage=1),
        "launch": LaunchConfig("local"),
        "loader": LoaderConfig(processes=0),
        "tracking": TrackingConfig("none"),
        "every": Intervals(log=1, evaluate=100, checkpoint=3, poll=1),
        "steps": 6,
        "seed": 5,
    }
    return RunConfig(**(defaults | changes))
