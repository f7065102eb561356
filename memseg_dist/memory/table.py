"""Where a bank's rows live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memseg_dist import dist

TableKind = Literal["local", "sharded"]


@dataclass(frozen=True)
class Table:
    """Which classes each rank holds, as contiguous ranges.

    "local": every rank holds every class; the reference. "sharded": rank r of W holds classes
    [r C / W, (r + 1) C / W), which may be none.
    """

    num_classes: int
    kind: TableKind = "sharded"

    def bounds(self) -> list[int]:
        """Class range of rank r is [bounds[r], bounds[r + 1])."""
        world_size = dist.size()
        return [rank * self.num_classes // world_size for rank in range(world_size + 1)]

    def owned(self) -> range:
        if self.kind == "local":
            return range(self.num_classes)
        bounds = self.bounds()
        return range(bounds[dist.rank()], bounds[dist.rank() + 1])
