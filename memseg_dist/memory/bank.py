"""A memory of the data set: rows per class, proposed in `forward`, committed once per step.

    bank = Bank(num_classes=21841, capacity=20, dim=768)       # the same call on every rank
    for each slot of this rank:
        means, counts = bank.means, bank.counts                # as of the last commit; no traffic
        bank.propose(class_ids, rows, clock)                   # local, detached, no traffic
    bank.commit(clock)                                         # collective: all ranks, once a step

Proposals are applied in (slot, row) order by the rank that owns the class, so the bank after a step
is the same for any number of workers. The rows are spread over the ranks; their means and counts
are on every rank. A class without rows has count 0 and a zero mean: whoever reads masks by count.

Shape letters: C classes, M capacity, D channels, E events of one step over all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.memory.proposals import Proposals
from memseg_dist.memory.publish import publish_rows
from memseg_dist.memory.ring import ring_means, ring_positions
from memseg_dist.memory.rows import PerClass, Reader, Rows
from memseg_dist.memory.table import Table, TableKind


class Bank:
    """Per-class rings of D-vectors. Lives outside the model, so that no engine casts or copies it.

    means: fp32 [C, D] and counts: int64 [C], the filled part of each ring, on `device`, replicated.
    dtype is that of the stored rows (fp32 or bf16); means are always summed in fp32.
    """

    def __init__(
        self,
        num_classes: int,
        capacity: int,
        dim: int,
        *,
        table: TableKind = "sharded",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(num_classes, capacity, dim) < 1:
            raise ValueError(
                f"a bank needs num_classes, capacity and dim of at least 1, got {num_classes}, "
                f"{capacity}, {dim}"
            )
        self.num_classes, self.capacity, self.dim = num_classes, capacity, dim
        self.table = Table(num_classes, table)
        self.owned = self.table.owned()
        self.means = torch.zeros(num_classes, dim, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._rows = torch.zeros(len(self.owned), capacity, dim, dtype=dtype, device=device)
        self._totals = np.zeros(num_classes, dtype=np.int64)  # events ever, on every rank
        self._last_step = np.full(num_classes, -1, dtype=np.int64)
        self._events = np.full((len(self.owned), capacity, 3), -1, dtype=np.int64)
        self._proposals = Proposals(1, self.means.new_empty(0, dim))

    def propose(self, class_ids: Sequence[int] | np.ndarray, rows: Tensor, clock: Clock) -> None:
        """One slot's events: rows [n, D] of the classes class_ids [n], in batch order."""
        ids = np.asarray(class_ids, dtype=np.int64)
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < self.num_classes), ids
        self._proposals.add(ids[:, None], rows, clock)

    @torch.no_grad()
    def commit(self, clock: Clock) -> None:
        """Apply all ranks' proposals. Collective: ids go over the host, vectors over the device."""
        ids_E1, origin_E2, rows_ED = self._proposals.gather()
        class_E = ids_E1[:, 0]
        if len(class_E) == 0:
            return
        event_E3 = np.insert(origin_E2, 0, clock.step, axis=1)
        position_E, survives_E = ring_positions(class_E, self._totals, self.capacity)
        is_owned_E = (class_E >= self.owned.start) & (class_E < self.owned.stop) & survives_E
        mine = np.flatnonzero(is_owned_E)
        local_class, position = class_E[mine] - self.owned.start, position_E[mine]
        index = (self._on_device(local_class), self._on_device(position))
        self._rows.index_put_(index, rows_ED[self._on_device(mine)].to(self._rows.dtype))
        self._events[local_class, position] = event_E3[mine]
        np.add.at(self._totals, class_E, 1)
        self._last_step[class_E] = clock.step
        self._refresh(np.unique(class_E))

    def summary(self, step: int) -> dict[str, float]:
        """fill: mean share of rows set; coverage: share of classes with any; staleness: mean number
        of steps since such a class was last written (0 without any)."""
        seen = self._totals > 0
        staleness = (step - self._last_step[seen]).mean() if seen.any() else 0.0
        return {
            "fill": float(np.minimum(self._totals, self.capacity).mean() / self.capacity),
            "coverage": float(seen.mean()),
            "staleness": float(staleness),
        }

    def per_class(self) -> PerClass:
        rows = np.minimum(self._totals, self.capacity)
        return PerClass(rows, self._totals.copy(), self._last_step.copy())

    def digest(self, *, values: bool = False) -> str:
        """SHA-256 of what was written where and when, equal at any number of workers.

        Every row's (step, slot, row) of origin, the counts and the last steps. values=True adds the
        vectors' bytes, which are equal only where the arithmetic is (the same number of workers).
        Collective.
        """
        parts = [self._events]
        if values:
            # bf16 has no numpy type: its bits are hashed through fp32, which holds it exactly
            parts.append(self._rows.float().cpu().numpy())
        local = [
            hashlib.sha256(b"".join(part[index].tobytes() for part in parts)).digest()
            for index in range(len(self.owned))
        ]
        classes = [local] if self.table.kind == "local" else dist.all_gather_object(local)
        total = hashlib.sha256(self._totals.tobytes() + self._last_step.tobytes())
        for digests in classes:
            total.update(b"".join(digests))
        return total.hexdigest()

    def state_dict(self) -> dict[str, Rows | Tensor]:
        start, total = self.owned.start, self.num_classes
        return {
            "rows": Rows(self._rows, start, total),
            "events": Rows(torch.from_numpy(self._events), start, total),
            "totals": torch.from_numpy(self._totals),
            "last_step": torch.from_numpy(self._last_step),
        }

    def load_state_dict(self, read: Reader) -> None:
        """Take over a bank saved by any ranks. ValueError if shapes differ. Collective."""
        totals = read("totals")
        if totals.shape != (self.num_classes,):
            raise ValueError(
                f"the saved bank has {totals.shape[0]} classes, this run has {self.num_classes}: "
                "the label space changed; resume with the sources of the saved run"
            )
        rows = read("rows", self.owned.start, self.owned.stop)
        if rows.shape[1:] != self._rows.shape[1:]:
            raise ValueError(
                f"the saved bank holds {rows.shape[1]} rows of {rows.shape[2]} channels per class, "
                f"this run wants {self.capacity} of {self.dim}"
            )
        self._rows.copy_(rows)
        self._events[:] = read("events", self.owned.start, self.owned.stop).numpy()
        self._totals[:] = totals.numpy()
        self._last_step[:] = read("last_step").numpy()
        self._proposals.clear()
        self.means.zero_()
        self._refresh(np.flatnonzero(self._totals))

    def publish(self, directory: str | Path, uids: Sequence[str]) -> None:
        """Write the filled rows as Parquet, one file per rank, for inspection and search.

        Columns: uid, slot (position in the ring), vector, count (rows of the class), last_step.
        """
        owns = self.table.kind == "sharded" or dist.rank() == 0
        fill = np.minimum(self._totals[self.owned.start : self.owned.stop], self.capacity)
        fill = fill if owns else np.zeros_like(fill)
        local, slot = np.nonzero(np.arange(self.capacity) < fill[:, None])
        class_ids = local + self.owned.start
        publish_rows(
            directory,
            uids,
            num_classes=self.num_classes,
            class_ids=class_ids,
            slots=slot,
            vectors=self._rows.float().cpu().numpy()[local, slot],
            last_steps=self._last_step[class_ids],
        )

    def _refresh(self, changed: np.ndarray) -> None:
        """Bring means and counts of the changed classes up to date; `changed` ascends."""
        changed_index = self._on_device(changed)
        totals = self._on_device(self._totals[changed])
        self.counts[changed_index] = totals.clamp(max=self.capacity)
        is_mine = (changed >= self.owned.start) & (changed < self.owned.stop)
        mine = self._on_device(changed[is_mine] - self.owned.start)
        means = ring_means(self._rows[mine], totals[self._on_device(np.flatnonzero(is_mine))])
        if self.table.kind == "sharded":
            sizes = np.diff(np.searchsorted(changed, self.table.bounds())).tolist()
            means = dist.all_gather_ragged(means, sizes)
        self.means[changed_index] = means

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.means.device, non_blocking=True)
