"""LarvSeg's memory: a ring of M events per class, read as one mean (section 3.2).

An event is the mean of one image's top-K pixel features, so the mean over a ring equals the paper's
mean over M x K stored pixels exactly.

Shape letters: C classes of the label space, R (image, label) pairs, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from memseg_dist.batch import Clock, onto_device
from memseg_dist.memory.layouts import Rings
from memseg_dist.memory.means import ClassMeans
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Overwrite
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.methods.pairs import LabelPairs


class PixelMemory:
    """rows: the rings, sharded by class; read: their means and counts, on every worker.

    With `memory_scope="slot"` every slot has rings of its own: class c of slot s is ring s C + c.
    """

    def __init__(
        self,
        config: LarvSegConfig,
        num_classes: int,
        dim: int,
        *,
        forgotten: Sequence[int] = (),
        num_slots: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes = num_classes
        self.num_scopes = num_slots if config.memory_scope == "slot" else 1
        self.warm_up = config.capacity if config.warm_up is None else config.warm_up
        self._is_kept = np.ones(num_classes, dtype=bool)
        self._is_kept[list(forgotten)] = False
        self.rows = ShardedRows(
            Rings(num_classes * self.num_scopes, config.capacity),
            Overwrite(),
            dim,
            table=config.memory_table,
            dtype=torch.bfloat16 if config.memory_dtype == "bf16" else torch.float32,
            device=device,
        )
        self.read = ClassMeans(self.rows)

    def propose(self, pairs: LabelPairs, event_RD: Tensor, is_seen_R: Tensor, clock: Clock) -> None:
        """The slot's events, but those of the classes that are not to be remembered, and of images
        of which nothing is seen.
        """
        kept = np.flatnonzero(self._is_kept[pairs.class_ids])
        if len(kept) < len(pairs):
            (index,) = onto_device(event_RD.device, kept)
            event_RD, is_seen_R = event_RD[index], is_seen_R[index]
        ids = pairs.class_ids[kept] + self._first_ring(clock)
        self.rows.propose(ids, event_RD, clock, weight=is_seen_R)

    def look_up(self, class_ids: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """Mean [..., D] of each class as of the last commit, and whether it is warm [...]."""
        ring = class_ids + self._first_ring(clock)
        return self.read.means[ring], self.read.counts[ring] >= self.warm_up

    def sizes(self) -> Tensor:
        """float [C] on the host: how many rows of each class are set."""
        return self.read.counts.view(self.num_scopes, -1).sum(dim=0).float().cpu()

    def set_means(self) -> tuple[Tensor, Tensor]:
        """Class ids int64 [n], ascending, and means [n, D] of the rings with rows, on the host."""
        ring = self.read.counts.nonzero()[:, 0]
        class_ids, order = (ring % self.num_classes).sort(stable=True)
        return class_ids.cpu(), self.read.means[ring[order]].cpu()

    def _first_ring(self, clock: Clock) -> int:
        return clock.slot * self.num_classes if self.num_scopes > 1 else 0
