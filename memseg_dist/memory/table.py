"""Where a bank's rows live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from memseg_dist import dist

TableKind = Literal["local", "sharded"]


@dataclass(frozen=True)
class Table:
    """Which classes each rank holds, as contiguous ranges.

    "local": every rank holds every class; the reference. "sharded": the classes are cut into one
    range per rank, which may be empty: of equal numbers of classes, or, with `rows_per_class`
    given, of numbers of rows as equal as whole classes allow.
    """

    num_classes: int
    kind: TableKind = "sharded"
    rows_per_class: Sequence[int] | np.ndarray | None = None

    def bounds(self) -> list[int]:
        """Class range of rank r is [bounds[r], bounds[r + 1])."""
        world_size = dist.size()
        if self.rows_per_class is None:
            return [rank * self.num_classes // world_size for rank in range(world_size + 1)]
        ends = np.cumsum(self.rows_per_class, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        # a class belongs to the rank in whose share of the rows its middle lies
        middles = 2 * ends - np.asarray(self.rows_per_class, dtype=np.int64)
        cuts = [2 * total * rank / world_size for rank in range(1, world_size)]
        return [0, *np.searchsorted(middles, cuts).tolist(), self.num_classes]

    def owned(self) -> range:
        if self.kind == "local":
            return range(self.num_classes)
        bounds = self.bounds()
        return range(bounds[dist.rank()], bounds[dist.rank() + 1])
