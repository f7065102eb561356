"""What the studies share: runs of one core, and the net and the rates of those on real pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from memseg_dist.config import (
    EngineConfig,
    Intervals,
    LaunchConfig,
    LoaderConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
)
from memseg_dist.nn.backbone import BackboneConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "jobs"))

ALONE = LaunchConfig("local", workers=1)
LITE0 = BackboneConfig(
    "tf_efficientnet_lite0", drop_path=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
OPTIMIZER = OptimizerConfig(
    "adamw", lr=2e-3, weight_decay=0.01, warmup_steps=30, backbone_lr_scale=0.3
)
"""On real pictures, from ImageNet weights."""


def alone(run: RunConfig, storage: Path, name: str, seed: int, steps: int, **changes: Any):
    """The run in one process and core, its figures kept in its own history alone."""
    return replace(
        run,
        name=name,
        storage=str(storage),
        seed=seed,
        steps=steps,
        launch=ALONE,
        engine=EngineConfig("torch", channels_last=True),
        loader=LoaderConfig(processes=0, cache_dir=str(storage / "cache")),
        tracking=TrackingConfig("none"),
        every=Intervals(log=50, evaluate=steps, checkpoint=steps),
        **changes,
    )


def slug(name: str) -> str:
    """A variant's name as one of a folder."""
    for old, new in ((" + ", "_"), ("+ ", "plus_"), (", ", "_"), (" ", "_"), ("=", ""), ("/", "_")):
        name = name.replace(old, new)
    return name
