"""The smallest run that has all parts: two sources, a memory, validation, checkpoints."""

from __future__ import annotations

from pathlib import Path

from memseg_dist.config import (
    EngineConfig,
    Intervals,
    LaunchConfig,
    LoaderConfig,
    RunConfig,
    TrackingConfig,
    ValidationConfig,
)
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.tools.miniature import draw_miniature

CLASSES = Vocabulary(tuple(Category(f"toy:{index}", f"toy {index}") for index in range(6)))


def draw(root: Path) -> None:
    for name in ("masks", "labels", "val"):
        draw_miniature(root / name, CLASSES, with_masks=name != "labels", size=40)


def tiny_run(data: Path, storage: Path, name: str = "tiny", **changes) -> RunConfig:
    augment = AugmentConfig(crop=32, resize=(32, 32))
    settings = {
        "sources": (
            Source("masks", str(data / "masks"), "masks", 1, 2, augment),
            Source("labels", str(data / "labels"), "labels", 1, 2, augment),
        ),
        "method": LarvSegConfig(capacity=2, top_k=2, warm_up=1),
        "backbone": BackboneConfig("test_vit", image_size=32, drop_path=0.0),
        "validation": ValidationConfig(
            str(data / "val"), resize=(32, 32), window=32, stride=32, num_panels=1, max_images=2
        ),
        "steps": 4,
        "engine": EngineConfig("torch"),
        "launch": LaunchConfig(launcher="local"),
        "tracking": TrackingConfig("none"),
        "loader": LoaderConfig(processes=0),
        "every": Intervals(log=1, evaluate=4, checkpoint=2, poll=1),
    }
    return RunConfig(name=name, storage=str(storage), **(settings | changes))
