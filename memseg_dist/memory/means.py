"""The mean of each class's rows, on every rank: reading it costs no traffic.

Shape letters: C classes, n changed classes, M capacity, D channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import onto_device
from memseg_dist.memory.layouts import Rings
from memseg_dist.memory.rows import ShardedRows

CLASSES = 1024
"""At once, where the rows of many are read."""


class ClassMeans:
    """means: fp32 [C, D], of the set rows of each class of a memory of rings; counts: int64 [C],
    how many those are. As of the last commit; a class without set rows has count 0 and a zero mean:
    whoever reads masks by count. Make it on every rank at once: it is collective.
    """

    def __init__(self, bank: ShardedRows) -> None:
        assert isinstance(bank.layout, Rings), "classes of unequal numbers of rows"
        self.bank, self.capacity = bank, bank.layout.capacity
        num_classes, device = bank.layout.num_classes, bank.classes.device
        self.means = torch.zeros(num_classes, *bank.shape, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        bank.add_read(self)

    def refresh(self, classes: np.ndarray, rows: Tensor | slice) -> None:
        """One small all-gather, of the changed classes; the host knows its sizes."""
        bank = self.bank
        mine = classes[(classes >= bank.owned.start) & (classes < bank.owned.stop)]
        first_n, changed = onto_device(
            self.means.device, bank.layout.starts[mine] - bank.start, classes
        )
        # in parts: a resumed run asks for all classes, whose rows should not be there twice
        found = torch.cat([self._mean_and_count(part_n) for part_n in first_n.split(CLASSES)])
        if bank.table == "sharded":
            sizes = np.diff(np.searchsorted(classes, bank.bounds)).tolist()
            found = dist.all_gather_ragged(found, sizes)
        self.means[changed] = found[:, :-1]
        self.counts[changed] = found[:, -1].long()

    def _mean_and_count(self, first_n: Tensor) -> Tensor:
        """[n, D + 1] of the classes whose first rows are these of the rank's."""
        index_nM = first_n[:, None] + torch.arange(self.capacity, device=first_n.device)
        is_set_nM = self.bank.updates[index_nM] > 0
        kept_nMD = torch.where(is_set_nM[:, :, None], self.bank.rows[index_nM].float(), 0.0)
        count_n1 = is_set_nM.sum(dim=1, keepdim=True)
        mean_nD = kept_nMD.sum(dim=1) / count_n1.clamp_min(1)
        return torch.cat([mean_nD, count_n1.to(mean_nD.dtype)], dim=1)
