"""A memory of the data set: rows that are proposed in `forward` and committed once per step.

    bank = ShardedRows(Rings(21841, 20), Overwrite(), 768)     # the same call on every rank
    means = ClassMeans(bank)                                   # a read: here one that is replicated
    for each slot of this rank:
        bank.propose(class_ids, rows, clock)                   # local, detached, no traffic
    bank.commit(clock)                                         # collective: all ranks, once a step

The layout says which rows there are and who owns them, the rule how a row takes an event. Events
are applied in (slot, row) order by the rank that owns the row, so the memory after a step is the
same for any number of workers. Nothing here waits for the device, but for what says so.

Shape letters: T rows held here, C classes, D values of a row, E events of one step, I id columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Clock, derive_seed, onto_device
from memseg_dist.memory.layouts import Layout, TableKind
from memseg_dist.memory.proposals import Proposals
from memseg_dist.memory.rules import Events, Rule
from memseg_dist.memory.state import PerClass, Reader, Rows


class Read(Protocol):
    """What is kept of a memory beside its rows; it is in `ShardedRows.reads`."""

    def refresh(self, classes: np.ndarray, rows: Tensor | slice) -> None:
        """Rows have changed: of the classes [n], ascending, the same on every rank; of this rank's
        rows those at the indices `rows`. Called on every rank: it may be collective.
        """
        ...


class ShardedRows:
    """The rows of a layout, moved by a rule. It lives outside the model: no engine casts it.

    shape: of one row, as (46, 46); a number for a vector. dtype: of the stored rows; an event's
    values and its weight travel and are reckoned with in fp32, or in the dtype if that is integer.
    noise_seed: rows start as N(0, 1), drawn for each class from this seed, and count as set.
    ValueError for a shape of nothing.

    start, owned: the first row and the classes of this rank. classes: int64 [T], on the device.
    """

    def __init__(
        self,
        layout: Layout,
        rule: Rule,
        shape: int | tuple[int, ...],
        *,
        table: TableKind = "sharded",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        noise_seed: int | None = None,
    ) -> None:
        self.layout, self.rule, self.table = layout, rule, table
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if min(self.shape, default=0) < 1:
            raise ValueError(f"rows of shape {self.shape}: every side must be at least 1")
        self.bounds = layout.bounds(dist.size() if table == "sharded" else 1)
        rank = dist.rank() if table == "sharded" else 0
        self.owned = range(self.bounds[rank], self.bounds[rank + 1])
        self.start, self._stop = (int(layout.starts[b]) for b in self.bounds[rank : rank + 2])
        self.classes = torch.from_numpy(layout.classes[self.start : self._stop]).to(device)
        num_rows, width = len(self.classes), math.prod(self.shape)
        # One row more than there are: events that write nothing are sent there.
        self._rows = torch.zeros(num_rows + 1, width, dtype=dtype, device=device)
        self._updates = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self._origin = torch.full((num_rows + 1, 3), -1, dtype=torch.int32, device=device)
        wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
        self._proposals = Proposals(
            layout.num_ids, torch.empty(0, width + 1, dtype=wide, device=device)
        )
        self._num_dropped = 0
        self.is_blank = noise_seed is None
        """No row has been set on any rank."""
        self.reads: list[Read] = []
        if noise_seed is not None:
            self._fill_with_noise(noise_seed)

    def _fill_with_noise(self, seed: int) -> None:
        for class_id in self.owned:
            low, high = self.layout.starts[class_id : class_id + 2] - self.start
            generator = torch.Generator().manual_seed(derive_seed(seed, "noise", class_id))
            self._rows[low:high] = torch.randn(high - low, len(self._rows[0]), generator=generator)
        self._updates[:-1] = 1

    # ---------------------------------------------------------------- reading

    @property
    def rows(self) -> Tensor:
        """[T, *shape], raw; unset where `is_set` says so."""
        return self._rows[:-1].unflatten(1, self.shape)

    @property
    def updates(self) -> Tensor:
        """int32 [T]: events that each row has taken."""
        return self._updates[:-1]

    @property
    def origin(self) -> Tensor:
        """int32 [T, 3]: step, slot and row in the slot of the last event of each row, or -1."""
        return self._origin[:-1]

    @property
    def is_set(self) -> Tensor:
        """bool [T]."""
        return self.updates > 0

    def set_rows(self) -> tuple[Tensor, list[int]]:
        """The set rows of the owned classes in order, and how many each class has. Syncs."""
        is_set = self.is_set
        local = self.classes[is_set] - self.owned.start
        return self.rows[is_set], torch.bincount(local, minlength=len(self.owned)).tolist()

    def add_read(self, read: Read) -> None:
        """Keep `read` up to date from now on; brings it up to date at once. Collective."""
        self.reads.append(read)
        if not self.is_blank:
            read.refresh(np.flatnonzero(self.layout.counts), slice(None))

    def put(self, values: np.ndarray) -> Tensor:
        """`values` on the device of the rows."""
        return onto_device(self._rows.device, values)[0]

    # ---------------------------------------------------------------- writing

    def propose(
        self,
        ids: Sequence[int] | np.ndarray,
        values: Tensor,
        clock: Clock,
        weight: Tensor | None = None,
    ) -> None:
        """One slot's events, in the order of the batch: local, detached, no traffic.

        ids: class ids [n], or (class, image) [n, 2] where the layout has a row for each; on the
        host. values: [n, *shape]. weight: [n], 1 where not given. An event of weight 0 is not
        written, whatever the device makes of it: that costs no host sync.
        """
        ids_EI = np.asarray(ids, dtype=np.int64).reshape(-1, self.layout.num_ids)
        assert values.shape == (len(ids_EI), *self.shape), f"{ids_EI.shape}, {values.shape}"
        assert len(ids_EI) == 0 or 0 <= ids_EI[:, 0].min() <= ids_EI[:, 0].max() < (
            self.layout.num_classes
        ), ids_EI[:, 0]
        dtype = self._proposals.empty.dtype
        if weight is None:
            weight = torch.ones(len(ids_EI), device=values.device)
        elif not dtype.is_floating_point:
            weight = weight > 0  # a whole number would lose a weight below 1
        payload = [values.flatten(1).to(dtype), weight[:, None].to(dtype)]
        self._proposals.add(ids_EI, torch.cat(payload, dim=1), clock)

    @torch.no_grad()
    def commit(self, clock: Clock) -> None:
        """Apply all ranks' events in (slot, row) order. Collective: ids go over the host, values
        over the device.
        """
        ids_EI, origin_E2, order_E, payload = self._proposals.gather()
        if len(ids_EI) == 0:
            return
        row_E = self.layout.find(ids_EI)
        has_row_E = row_E >= 0
        self._num_dropped += int((~has_row_E).sum())
        mine = np.flatnonzero((row_E >= self.start) & (row_E < self._stop))
        written: Tensor | slice = slice(0)
        if len(mine):
            step_E = np.full(len(mine), clock.step)
            host = [order_E[mine], row_E[mine] - self.start, step_E, *origin_E2[mine].T]
            table = self.put(np.stack(host))  # one copy to the device
            written = self._write(table[1], payload[table[0]], table[2:].T, clock)
        self._tell(np.unique(ids_EI[has_row_E, 0]), written)

    def _write(self, first_E: Tensor, payload: Tensor, origin_E3: Tensor, clock: Clock) -> Tensor:
        """Apply events to the rows held here; gives the row of each."""
        values_ED, weight_E = payload[:, :-1], payload[:, -1]
        target_E = self.layout.target(first_E, weight_E > 0, self._updates)
        is_new_E = self._updates[target_E] == 0
        is_written_E = self.rule.writes(weight_E, is_new_E, clock)
        same_EE = (target_E[:, None] == target_E) & is_written_E
        old_ED = self._rows[target_E].to(values_ED.dtype)
        new_ED = self.rule(Events(old_ED, is_new_E, values_ED, weight_E, same_EE, clock))
        # Each row is written once, by its last event.
        is_last_E = is_written_E & (same_EE.triu(1).sum(dim=1) == 0)
        index_E = torch.where(is_last_E, target_E, len(self.classes))
        self._rows[index_E] = new_ED.to(self._rows.dtype)
        self._origin[index_E] = origin_E3.to(torch.int32)
        self._updates[index_E] += same_EE.sum(dim=1).to(torch.int32)
        return target_E

    def _tell(self, classes: np.ndarray, rows: Tensor | slice) -> None:
        self.is_blank = False
        for read in self.reads:
            read.refresh(classes, rows)

    # ---------------------------------------------------------------- looking at it

    def summary(self, step: int) -> dict[str, float]:
        """fill: share of the rows that are set; coverage: share of the classes with rows of which
        one is set; staleness: mean number of steps since a set row was written; dropped: events
        without a row so far. Collective; waits for the device.
        """
        counts, has_rows = self.per_class().rows, self.layout.counts > 0
        stale = ((step - self.origin[:, 0]) * self.is_set).sum(dtype=torch.float64)
        if self.table == "sharded":
            stale = dist.all_reduce_sum(stale)
        num_set = int(counts.sum())
        return {
            "fill": num_set / max(len(self.layout), 1),
            "coverage": float((counts[has_rows] > 0).mean()) if has_rows.any() else 0.0,
            "staleness": float(stale) / max(num_set, 1),
            "dropped": float(self._num_dropped),
        }

    def per_class(self) -> PerClass:
        """Collective; waits for the device."""
        device, num_classes = self._rows.device, self.layout.num_classes
        sums = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
        sums[0].index_add_(0, self.classes, self.is_set.long())
        sums[1].index_add_(0, self.classes, self.updates.long())
        after_last = self.origin[:, 0].long() + 1  # 0: never
        sums[2].scatter_reduce_(0, self.classes, after_last, "amax")
        if self.table == "sharded":
            sums = dist.all_reduce_sum(sums)  # a class lies on one rank: its maximum too adds up
        rows, events, after = sums.cpu().numpy()
        return PerClass(rows, events, after - 1)

    def publish(self, directory: str | Path, uids: Sequence[str]) -> None:
        """Write the set rows as Parquet, one file per rank, for inspection and search.

        Columns: uid, position (of the row in its class), vector, count (set rows of the class),
        last_step. ValueError for another number of uids than classes.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if len(uids) != self.layout.num_classes:
            raise ValueError(
                f"{len(uids)} uids for a memory of {self.layout.num_classes} classes: give one each"
            )
        is_mine = self.table == "sharded" or dist.rank() == 0
        held = np.flatnonzero(self.is_set.cpu().numpy() & is_mine)
        class_ids = self.layout.classes[held + self.start]
        position = held + self.start - self.layout.starts[class_ids]
        vectors = self._rows[self.put(held)].float().cpu().numpy()
        columns = {
            "uid": pa.array(np.asarray(uids, dtype=object)[class_ids], pa.string()),
            "position": pa.array(position.astype(np.int32)),
            "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
            "count": pa.array(np.bincount(class_ids, minlength=len(uids))[class_ids]),
            "last_step": pa.array(self.origin[:, 0].cpu().numpy()[held].astype(np.int64)),
        }
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"bank-{dist.rank():05d}-of-{dist.size():05d}.parquet"
        pq.write_table(pa.table(columns), folder / name, write_page_checksum=True)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Rows | Tensor]:
        """The rows of all ranks, and "class" with "image" or "position", which say which they are.
        Proposals are not in it: it is taken between steps.
        """
        held = {"rows": self.rows, "updates": self.updates, "origin": self.origin}
        for name, key in self.layout.keys.items():
            held[name] = torch.from_numpy(key[self.start : self._stop])
        total = len(self.layout)
        state: dict[str, Rows | Tensor] = {n: Rows(t, self.start, total) for n, t in held.items()}
        return state | {"dropped": torch.tensor([self._num_dropped])}

    def load_state_dict(self, read: Reader) -> None:
        """Take over a memory saved by any ranks. Collective.

        ValueError if its classes, images, capacity or the shape of its rows are others.
        """
        self.layout.check_saved(read)
        rows = read("rows", self.start, self._stop)
        if rows.shape[1:] != self.shape:
            raise ValueError(
                f"the saved memory has rows of shape {tuple(rows.shape[1:])}, this run wants "
                f"{self.shape}: the channels of the model or the size of the maps have changed; "
                "restore them, or give the run another name"
            )
        self._rows[:-1] = rows.flatten(1).to(self._rows)
        self._updates[:-1] = read("updates", self.start, self._stop).to(self._updates)
        self._origin[:-1] = read("origin", self.start, self._stop).to(self._origin)
        self._num_dropped = int(read("dropped")[0])
        self._proposals.clear()
        self._tell(np.flatnonzero(self.layout.counts), slice(None))
