"""A method of a few hundred weights, its configs and checkpoints: what the training tests train."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memseg_dist.batch import Batch, Clock
from memseg_dist.config import EngineConfig, OptimizerConfig, RunConfig
from memseg_dist.data.loader import Source, slots_of
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.memory.state import Stateful
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.methods.method import Method
from memseg_dist.nn.batchnorm import record_batchnorm
from memseg_dist.train.engine import Engine
from memseg_dist.train.saver import Saver


class Tiny(Method):
    """Dropout, BatchNorm, and a head per source, so that workers use different parameters."""

    def __init__(self, num_sources: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.2)
        )
        self.heads = nn.ModuleDict({f"source{i}": nn.Linear(5, 4) for i in range(num_sources)})
        self.scale = nn.Parameter(torch.ones(()))
        record_batchnorm(self)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        features = self.backbone(batch.images / 255.0).mean(dim=(2, 3))
        logits = self.scale * self.heads[batch.source](features)
        target = torch.tensor([labels[0] for labels in batch.labels])
        return {
            "classification": nn.functional.cross_entropy(logits, target),
            "decay": 0.01 * features.square().mean(),
        }


def tiny_batch(step: int, slot: int, num_sources: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + slot)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = tuple((int(torch.randint(0, 4, (), generator=generator)),) for _ in range(2))
    return Batch(
        images=images,
        valid=torch.ones(2, 8, 8, dtype=torch.bool),
        masks=None,
        labels=labels,
        source=f"source{slot * num_sources // NUM_SLOTS}",
        supervision="labels",
        keys=(f"{step}-{slot}-0", f"{step}-{slot}-1"),
    )


NUM_SLOTS = 5


def micro_batches(step: int, rank: int, size: int) -> list[tuple[Batch, Clock]]:
    """A rank's slots of a step, padded with idle repeats of its first, as the loader gives them."""
    return [
        (tiny_batch(step, slot), Clock(step, slot, NUM_SLOTS, idle, seed=7))
        for slot, idle in slots_of(rank, size, NUM_SLOTS)
    ]


def tiny_config(
    optimizer: OptimizerConfig | None = None, engine: EngineConfig | None = None
) -> RunConfig:
    return RunConfig(
        name="tiny",
        storage="/nowhere",
        sources=(
            Source("source0", "/nowhere", "labels", slots=3, batch_per_slot=2),
            Source("source1", "/nowhere", "labels", slots=2, batch_per_slot=2),
        ),
        method=ClassifyConfig(),
        optimizer=optimizer or OptimizerConfig(lr=0.1),
        engine=engine or EngineConfig(kind="torch"),
    )


def save(
    directory: str,
    step: int,
    engine: Engine,
    memories: Mapping[str, Stateful],
    config: RunConfig,
    label_space: LabelSpace,
    *,
    data: Mapping[str, str] = {},
    keep: int,
) -> str:
    """Write a checkpoint and wait for it. Collective. Returns its path. data: none is checked.

    An error of one rank is raised on every rank, and leaves nothing that `latest` would choose.
    """
    saver = Saver(directory, config, label_space, data, keep)
    saver.start(step, engine, memories)
    path = saver.settle(wait=True)
    assert path is not None
    return path
