"""The activation maps of a whole training run, the strongest at each place kept (OAA).

One uint8 array keyed by (class, image), sharded by class: proposed by slots, committed once a step,
the same at any number of workers. Maps cover the stored image, however it was cropped and flipped.

Shape letters: T maps held here, g x g places, E events, R regions of a slot, h x w feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Clock, Place
from memseg_dist.memory.proposals import Proposals
from memseg_dist.memory.region_bank import check_same_regions
from memseg_dist.memory.regions import NO_ROW, Regions
from memseg_dist.memory.rows import Reader, Rows
from memseg_dist.memory.table import Table, TableKind


class MapStore:
    """uint8 [T, g, g] of the owned classes, 0..255; a map that was never written has 0 updates."""

    def __init__(
        self,
        regions: Regions,
        size: int,
        *,
        table: TableKind = "sharded",
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise ValueError(f"maps of {size} x {size} places; use 1 or more")
        self.regions, self.size = regions, size
        self.table = Table(regions.num_classes, table, regions.counts)
        owned = self.table.owned()
        self.owned, self.start = owned, int(regions.starts[owned.start])
        num_rows = int(regions.starts[owned.stop]) - self.start
        self.maps = torch.zeros(num_rows, size, size, dtype=torch.uint8, device=device)
        self.updates = torch.zeros(num_rows, dtype=torch.int32, device=device)
        empty = torch.zeros(0, size * size + 1, dtype=torch.uint8, device=device)
        self._proposals = Proposals(2, empty)

    def propose(
        self, classes: np.ndarray, images: np.ndarray, maps: Tensor, gate: Tensor, clock: Clock
    ) -> None:
        """One slot's maps [n, g, g] in 0..1, with class and image ids [n]; gate False: no write."""
        levels = (255 * maps.detach()).round().to(torch.uint8).flatten(1)
        rows = torch.cat([levels, gate.to(torch.uint8)[:, None]], dim=1)
        self._proposals.add(np.stack([classes, images], axis=1), rows, clock)

    @torch.no_grad()
    def commit(self, clock: Clock, *, even_below_gate: bool = False) -> None:
        """Keep the maximum of what was and what came. Collective.

        even_below_gate: maps that were never written take what came, whatever the gate said.
        """
        ids_E2, _, rows_E = self._proposals.gather()
        row_E = self.regions.find(ids_E2[:, 0], ids_E2[:, 1])
        is_mine = (ids_E2[:, 0] >= self.owned.start) & (ids_E2[:, 0] < self.owned.stop)
        mine = np.flatnonzero(is_mine & (row_E != NO_ROW))
        if len(mine) == 0:
            return
        device = self.maps.device
        target = torch.from_numpy(row_E[mine] - self.start).to(device, non_blocking=True)
        events = rows_E[torch.from_numpy(mine).to(device, non_blocking=True)]
        gate = events[:, -1] > 0
        if even_below_gate:
            gate = gate | (self.updates[target] == 0)
        came = events[:, :-1] * gate[:, None].to(torch.uint8)
        index = target[:, None].expand_as(came)
        self.maps.view(len(self.maps), -1).scatter_reduce_(0, index, came, "amax")
        self.updates.scatter_add_(0, target, gate.to(torch.int32))

    def coverage(self) -> float:
        """Share of the maps that were ever written. Collective."""
        written = (self.updates > 0).sum()
        if self.table.kind == "sharded":
            written = dist.all_reduce_sum(written)
        return int(written) / max(len(self.regions), 1)

    def state_dict(self) -> dict[str, Rows | Tensor]:
        total, stop = len(self.regions), self.start + len(self.maps)
        return {
            "maps": Rows(self.maps, self.start, total),
            "updates": Rows(self.updates, self.start, total),
            "class": Rows(
                torch.from_numpy(self.regions.classes[self.start : stop]), self.start, total
            ),
            "image": Rows(
                torch.from_numpy(self.regions.images[self.start : stop]), self.start, total
            ),
        }

    def load_state_dict(self, read: Reader) -> None:
        """Take over maps saved by any ranks. ValueError if the images or the size are others."""
        check_same_regions(self.regions, read, "map store")
        start, stop = self.start, self.start + len(self.maps)
        maps = read("maps", start, stop)
        if maps.shape[1:] != self.maps.shape[1:]:
            raise ValueError(
                f"the saved maps have {maps.shape[1]} x {maps.shape[2]} places, this run wants "
                f"{self.size} x {self.size}; keep map_size, or give the run another name"
            )
        self.maps.copy_(maps)
        self.updates.copy_(read("updates", start, stop))
        self._proposals.clear()


def onto_stored_image(
    maps_Rhw: Tensor, places: Sequence[Place], crop_size: tuple[int, int], size: int
) -> Tensor:
    """Maps of crops -> maps [R, g, g] of the stored images, bilinear; 0 outside the crop.

    places: where each map's crop lies. crop_size: (height, width) of the crops in pixels.
    """
    device = maps_Rhw.device
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    box = torch.tensor(
        [[p.left, p.top, p.width, p.height, p.columns, p.rows] for p in places],
        dtype=torch.float64,
    ).reshape(-1, 6)
    flipped = torch.tensor([place.flipped for place in places], dtype=torch.bool)[:, None]
    x = (centre - box[:, 0:1]) / box[:, 2:3]  # within the crop's valid part, 0..1
    y = (centre - box[:, 1:2]) / box[:, 3:4]
    inside = ((y >= 0) & (y <= 1))[:, :, None] & ((x >= 0) & (x <= 1))[:, None, :]
    x = torch.where(flipped, 1 - x, x) * box[:, 4:5] / crop_size[1]
    y = y * box[:, 5:6] / crop_size[0]
    grid = torch.stack(
        [x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    grid = (2 * grid - 1).to(maps_Rhw.dtype).to(device, non_blocking=True)
    sampled = F.grid_sample(maps_Rhw[:, None], grid, padding_mode="border", align_corners=False)
    return sampled[:, 0] * inside.to(device, non_blocking=True)
