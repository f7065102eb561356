"""A memory with one row per (class, image): what an image's region of a class looked like so far.

    bank = RegionBank(regions, dim=512)                       # the same call on every rank
    for each slot of this rank:
        losses = bank.contrast(queries, classes, 0.07)        # collective: every slot calls it
        bank.propose(classes, images, vectors, gate, clock)   # local, detached, no traffic
    bank.commit(clock)                                        # collective, once a step

The rows stay with the rank that owns the class; queries travel. A row is unset until its first
write, which copies; later writes blend with `momentum` (RCA, Eq. 3). Unset rows are read by nobody.

Shape letters: T rows held here, D channels, E events or queries of all ranks, M of this rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Clock, derive_seed
from memseg_dist.memory.contrast import RowContrast
from memseg_dist.memory.proposals import Proposals
from memseg_dist.memory.publish import publish_rows
from memseg_dist.memory.regions import NO_ROW, Regions
from memseg_dist.memory.rows import PerClass, Reader, Rows
from memseg_dist.memory.table import Table, TableKind

Keying = Literal["image", "ring"]


class RegionBank:
    """fp32 rows [T, D] of the owned classes, in the order of `regions`.

    keying "image": an event goes to the row of its (class, image); one without a row (cut by the
    capacity) is dropped. "ring": it goes to the class's next row in turn, as in RCA's code, and
    blends with what was there. noise: rows start as N(0, 1) and count as set, as in RCA's code.
    """

    def __init__(
        self,
        regions: Regions,
        dim: int,
        *,
        momentum: float = 0.99,
        keying: Keying = "image",
        noise: bool = False,
        table: TableKind = "sharded",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}; it must lie in 0..1")
        self.regions, self.dim, self.momentum, self.keying = regions, dim, momentum, keying
        self.table = Table(regions.num_classes, table, regions.counts)
        self.owned = self.table.owned()
        self.start = int(regions.starts[self.owned.start])
        stop = int(regions.starts[self.owned.stop])
        self._num_rows = stop - self.start
        # one row more than there are: events that write nothing are sent there
        self._rows = torch.zeros(self._num_rows + 1, dim, device=device)
        self._updates = torch.zeros(self._num_rows + 1, dtype=torch.int32, device=device)
        self._last_step = torch.full_like(self._updates, -1)
        self._pointer = torch.zeros(len(self.owned), dtype=torch.int64, device=device)
        self._classes = torch.from_numpy(regions.classes[self.start : stop]).to(device)
        if noise:
            for class_id in self.owned:
                low, high = regions.starts[class_id : class_id + 2] - self.start
                generator = torch.Generator().manual_seed(derive_seed(seed, "noise", class_id))
                self._rows[low:high] = torch.randn(high - low, dim, generator=generator)
            self._updates[:-1] = 1
        self._length = torch.ones(self._num_rows, device=device)
        self._measure(slice(None))
        self._proposals = Proposals(2, self._rows.new_empty(0, dim + 1))

    # ---------------------------------------------------------------- reading

    @property
    def rows(self) -> Tensor:
        """[T, D], raw; unset where `is_set` says so."""
        return self._rows[:-1]

    @property
    def is_set(self) -> Tensor:
        """bool [T]."""
        return self._updates[:-1] > 0

    def contrast(self, queries_MD: Tensor, classes_M: np.ndarray, temperature: float) -> Tensor:
        """NCE_c(q) of Eq. 4 for each query and its class, over the set rows of all ranks: [M].

        Mean over the rows p of the class of softplus(logsumexp over the rows of all other classes
        of s - s_p), s the cosine over `temperature`. 0 for a class without rows. The gradient
        flows to the queries. Collective, for any number of queries, none included.
        """
        return RowContrast.apply(
            torch.nn.functional.normalize(queries_MD.to(self._rows.dtype), dim=1),
            torch.from_numpy(np.asarray(classes_M, dtype=np.int64)),
            self.rows,
            self._length,
            self._classes,
            self.is_set,
            temperature,
            self.table.kind == "sharded",
        )

    def set_rows(self) -> tuple[Tensor, list[int]]:
        """The set rows of the owned classes in order, and how many each class has. Syncs."""
        is_set = self.is_set
        local = self._classes[is_set] - self.owned.start
        return self.rows[is_set], torch.bincount(local, minlength=len(self.owned)).tolist()

    # ---------------------------------------------------------------- writing

    def propose(
        self,
        classes: np.ndarray,
        images: np.ndarray,
        vectors: Tensor,
        gate: Tensor,
        clock: Clock,
    ) -> None:
        """One slot's events: classes and image ids [n] on the host, vectors [n, D].

        gate bool [n]: False writes nothing. It may depend on the device: it costs no host sync.
        """
        rows = torch.cat([vectors.detach(), gate.to(vectors.dtype)[:, None]], dim=1)
        self._proposals.add(np.stack([classes, images], axis=1), rows, clock)

    @torch.no_grad()
    def commit(self, clock: Clock) -> None:
        """Apply all ranks' events in (slot, row) order. Collective."""
        ids_E2, _, rows_E = self._proposals.gather()
        is_mine = (ids_E2[:, 0] >= self.owned.start) & (ids_E2[:, 0] < self.owned.stop)
        row_E = np.zeros(len(ids_E2), dtype=np.int64)
        if self.keying == "image":
            row_E = self.regions.find(ids_E2[:, 0], ids_E2[:, 1])
            is_mine &= row_E != NO_ROW
        mine = np.flatnonzero(is_mine)
        if len(mine) == 0:
            return
        events = rows_E[self._on_device(mine)]
        gate, vectors = events[:, -1] > 0.5, events[:, :-1]
        if self.keying == "image":
            target = self._on_device(row_E[mine] - self.start)
        else:
            target = self._next_in_ring(self._on_device(ids_E2[mine, 0] - self.owned.start), gate)
        self._blend(target, vectors, gate, clock.step)

    def _next_in_ring(self, local_class: Tensor, gate: Tensor) -> Tensor:
        """Row of each gated event, by turns within its class; the pointers move on."""
        same = local_class[:, None] == local_class
        earlier = (same & gate).tril(-1).sum(dim=1)
        num_rows = self._on_device(self.regions.counts)[local_class + self.owned.start]
        start = self._on_device(self.regions.starts - self.start)[local_class + self.owned.start]
        position = (self._pointer[local_class] + earlier) % num_rows
        self._pointer.index_put_((local_class,), gate.long(), accumulate=True)
        return start + position

    def _blend(self, target: Tensor, vectors: Tensor, gate: Tensor, step: int) -> None:
        """m <- g m + (1 - g) f (Eq. 3) for the gated events, one after another; the first copies.

        n events of one row at once: m <- g^n m + sum_k (1 - g) g^(n - 1 - k) f_k.
        """
        same = (target[:, None] == target) & gate
        before, after = same.tril(-1).sum(dim=1), same.triu(1).sum(dim=1)
        is_new = self._updates[target] == 0
        share = torch.pow(self.momentum, after.to(self._rows.dtype))
        share = torch.where(is_new & (before == 0), share, (1 - self.momentum) * share)
        count = same.sum(dim=1)
        decay = torch.pow(self.momentum, count.to(self._rows.dtype))
        kept = torch.where(is_new, 0.0, decay)[:, None] * self._rows[target]
        blended = kept + (same * share).to(vectors.dtype) @ vectors
        # each row is written once, by its first gated event
        written = torch.where(gate & (before == 0), target, self._num_rows)
        self._rows[written] = blended.to(self._rows.dtype)
        self._updates[written] += count.to(torch.int32)
        self._last_step[written] = step
        self._updates[-1] = 0
        self._measure(target)

    def _measure(self, index: Tensor | slice) -> None:
        length = self._rows[:-1][index].norm(dim=1).clamp_min(1e-12)
        self._length[index] = length.to(self._length.dtype)

    # ---------------------------------------------------------------- looking at it

    def summary(self, step: int) -> dict[str, float]:
        """fill: share of the rows set; coverage: share of the classes with any row of those that
        have one to set; staleness: mean number of steps since a set row was written. Collective.
        """
        is_set = self.is_set
        counts = self.counts()
        stale = (step - self._last_step[:-1][is_set]).double().sum()
        if self.table.kind == "sharded":
            stale = dist.all_reduce_sum(stale)
        num_set, has_rows = int(counts.sum()), self.regions.counts > 0
        return {
            "fill": num_set / max(len(self.regions), 1),
            "coverage": float((counts[has_rows] > 0).mean()) if has_rows.any() else 0.0,
            "staleness": float(stale) / max(num_set, 1),
        }

    def counts(self) -> np.ndarray:
        """int64 [C]: rows set per class. Collective."""
        return self.per_class().rows

    def per_class(self) -> PerClass:
        """Collective."""
        sums = torch.zeros(3, self.regions.num_classes, dtype=torch.int64, device=self._rows.device)
        updates, last = self._updates[:-1].long(), self._last_step[:-1].long()
        sums[0].index_add_(0, self._classes, self.is_set.long())
        sums[1].index_add_(0, self._classes, updates)
        sums[2].scatter_reduce_(0, self._classes, last + 1, "amax")  # 0: never
        if self.table.kind == "sharded":
            sums = dist.all_reduce_sum(sums)  # a class lies on one rank: its maximum too adds up
        rows, events, after_last = sums.cpu().numpy()
        return PerClass(rows, events, after_last - 1)

    def digest(self, *, values: bool = False) -> str:
        """SHA-256 of which rows were written, how often and when; values: of the vectors too.

        Without values equal at any number of workers, as long as their gates agree. Collective.
        """
        parts = [self._updates[:-1, None].cpu(), self._last_step[:-1, None].cpu()]
        parts += [self.rows.cpu()] if values else []
        local = [
            hashlib.sha256(b"".join(part[row].numpy().tobytes() for part in parts)).digest()
            for row in range(self._num_rows)
        ]
        ranks = [local] if self.table.kind == "local" else dist.all_gather_object(local)
        total = hashlib.sha256(self.regions.classes.tobytes() + self.regions.images.tobytes())
        for digests in ranks:
            total.update(b"".join(digests))
        return total.hexdigest()

    def publish(self, directory: str | Path, uids: Sequence[str]) -> None:
        """Write the set rows as Parquet, one file per rank; slot: the row's number in its class.

        Errors: ValueError for another number of uids than classes.
        """
        is_set = self.is_set.cpu().numpy()
        if self.table.kind == "local" and dist.rank() > 0:
            is_set = np.zeros_like(is_set)
        class_ids = self._classes.cpu().numpy()[is_set]
        number = np.arange(self._num_rows) + self.start - self.regions.starts[self._classes.cpu()]
        publish_rows(
            directory,
            uids,
            num_classes=self.regions.num_classes,
            class_ids=class_ids,
            slots=number[is_set],
            vectors=self.rows.cpu().numpy()[is_set],
            last_steps=self._last_step[:-1].cpu().numpy()[is_set],
        )

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Rows | Tensor]:
        total, stop = len(self.regions), self.start + self._num_rows
        state: dict[str, Rows | Tensor] = {
            "rows": Rows(self.rows, self.start, total),
            "updates": Rows(self._updates[:-1], self.start, total),
            "last_step": Rows(self._last_step[:-1], self.start, total),
            "pointer": Rows(self._pointer, self.owned.start, self.regions.num_classes),
        }
        for name, column in (("class", self.regions.classes), ("image", self.regions.images)):
            state[name] = Rows(torch.from_numpy(column[self.start : stop]), self.start, total)
        return state

    def load_state_dict(self, read: Reader) -> None:
        """Take over a bank saved by any ranks. ValueError if its rows or channels are others."""
        check_same_regions(self.regions, read, "region memory")
        start, stop = self.start, self.start + self._num_rows
        rows = read("rows", start, stop)
        if rows.shape[1] != self.dim:
            raise ValueError(
                f"the saved region memory has {rows.shape[1]} channels, this run has {self.dim}"
            )
        self._rows[:-1] = rows.to(self._rows.device)
        self._updates[:-1] = read("updates", start, stop).to(self._rows.device)
        self._last_step[:-1] = read("last_step", start, stop).to(self._rows.device)
        self._pointer[:] = read("pointer", self.owned.start, self.owned.stop).to(self._rows.device)
        self._proposals.clear()
        self._measure(slice(None))

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._rows.device, non_blocking=True)


def check_same_regions(regions: Regions, read: Reader, what: str) -> None:
    """ValueError unless the saved (class, image) pairs are those of `regions`."""
    classes, images = read("class").numpy(), read("image").numpy()
    if np.array_equal(classes, regions.classes) and np.array_equal(images, regions.images):
        return
    num_saved, num_now = len(np.unique(images)), len(np.unique(regions.images))
    changed = np.unique(classes)[:0]
    if len(classes) and len(regions):
        size = max(int(classes.max()) + 1, regions.num_classes)
        before, now = (np.bincount(ids, minlength=size) for ids in (classes, regions.classes))
        changed = np.flatnonzero(before != now)
    raise ValueError(
        f"the saved {what} has {len(classes)} (class, image) rows of {num_saved} images, this run "
        f"has {len(regions)} of {num_now}; classes with another number of images: "
        f"{changed[:8].tolist()}: images or labels of a source, or the capacity, have changed; "
        "restore them, or give the run another name"
    )
