"""What the slots of a step hand in, and how all ranks come to see it in one order.

    proposals.add(ids, rows, clock)          # in forward: local, detached, no traffic
    seen = proposals.gather()                # collective, once per step: every rank gets the same

The order is (slot, row), whichever rank ran the slot: what is applied in it cannot depend on the
number of workers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Clock


class Gathered(NamedTuple):
    """All ranks' proposals, in order: ids int64 [E, I]; origin int64 [E, 2], (slot, row).

    rows: [E, ...] as they came, that of event e at order[e]. What else the reader brings to the
    device can go there together with the order.
    """

    ids: np.ndarray
    origin: np.ndarray
    order: np.ndarray
    rows: Tensor


class Proposals:
    """Proposals of rows of one shape; `empty` is what a rank sends that has none: [0, ...]."""

    def __init__(self, num_ids: int, empty: Tensor) -> None:
        assert empty.shape[0] == 0, f"no rows expected, got {tuple(empty.shape)}"
        self.num_ids, self.empty = num_ids, empty
        self._of_slot: dict[int, tuple[np.ndarray, Tensor]] = {}

    def add(self, ids_EI: np.ndarray, rows: Tensor, clock: Clock) -> None:
        """One slot's rows [n, ...] and their ids [n, I], in the order of the batch.

        A second proposal of the same slot replaces the first, so recomputed activations cannot
        write twice; an idle clock's is dropped.
        """
        if clock.idle:
            return
        assert ids_EI.shape == (len(rows), self.num_ids), f"{ids_EI.shape}, {tuple(rows.shape)}"
        assert rows.shape[1:] == self.empty.shape[1:], f"{rows.shape}, {self.empty.shape}"
        self._of_slot[clock.slot] = (ids_EI.astype(np.int64), rows.detach().to(self.empty.dtype))

    def clear(self) -> None:
        self._of_slot.clear()

    def gather(self) -> Gathered:
        """Ids travel over the host, rows over their device. Collective; the proposals are gone."""
        slots = sorted(self._of_slot)
        headers = [np.empty((0, self.num_ids + 2), np.int64)]
        for slot in slots:
            ids = self._of_slot[slot][0]
            origin = np.stack([np.full(len(ids), slot), np.arange(len(ids))], axis=1)
            headers.append(np.concatenate([ids, origin], axis=1))
        local = torch.from_numpy(np.concatenate(headers))
        local_rows = torch.cat([self.empty, *[self._of_slot[slot][1] for slot in slots]])
        self.clear()
        counts = dist.all_gather(torch.tensor([len(local)])).flatten().tolist()
        header = dist.all_gather_ragged(local, counts).numpy()
        rows = dist.all_gather_ragged(local_rows, counts)
        order = np.lexsort((header[:, -1], header[:, -2]))
        header = header[order]
        return Gathered(header[:, : self.num_ids], header[:, self.num_ids :], order, rows)
