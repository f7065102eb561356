"""RCA's memory of regions (Eq. 3): one row per (class, image), or the rings of its code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from memseg_dist.memory.layouts import Regions, Rings
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Momentum
from memseg_dist.methods.rca.config import RING_CAPACITY, RCAConfig


@dataclass(frozen=True)
class TrainingSet:
    """What a training run knows of its data beyond the batches.

    regions: every (class, image) pair of the sources. epoch_steps: steps in which the sources'
    images are seen once. num_steps: steps of the run.
    """

    regions: Regions
    epoch_steps: int
    num_steps: int


def region_memory(
    config: RCAConfig,
    regions: Regions,
    class_ids: np.ndarray,
    dim: int,
    seed: int,
    device: torch.device | str,
) -> ShardedRows:
    """Rows of `dim` channels for the (class, image) pairs of `regions`, or with keying "ring" for
    `class_ids`, whatever image they are of. With `noise` they start as N(0, 1) and count as set.
    """
    layout: Rings | Regions
    if config.keying == "ring":
        layout = Rings(regions.num_classes, config.capacity or RING_CAPACITY, class_ids)
    else:
        layout = regions.cut(config.capacity, seed)
    return ShardedRows(
        layout,
        Momentum(config.momentum),
        dim,
        table=config.memory_table,
        noise_seed=seed if config.noise else None,
        device=device,
    )
