"""Online accumulation of activation maps (OAA): the strongest at each place over a training run.

Maps cover the stored image, however it was cropped and flipped; the memory keeps one per (class,
image), uint8, 0..255.

Shape letters: R (image, label) pairs of a slot, g x g places, h x w feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import Batch, Clock, CropBox, onto_device
from memseg_dist.memory.layouts import Regions
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Maximum
from memseg_dist.methods.pairs import LabelPairs
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.methods.rca.contrast import image_ids


class MapAccumulator:
    """rows: the maps [T, g, g], sharded by class."""

    def __init__(
        self, config: RCAConfig, regions: Regions, fill_from: int, device: torch.device | str
    ) -> None:
        """fill_from: from this step on an image whose score never reached the gate gets its map
        after all.
        """
        self.size, self.gate = config.map_size, config.map_gate
        self.rows = ShardedRows(
            regions,
            Maximum(fill_from),
            (self.size, self.size),
            table=config.memory_table,
            dtype=torch.uint8,
            device=device,
        )

    @torch.no_grad()
    def propose(
        self,
        batch: Batch,
        pairs: LabelPairs,
        map_Rhw: Tensor,
        stride: int,
        score_R: Tensor,
        clock: Clock,
    ) -> None:
        """One slot's maps over their maxima; those whose class scores below the gate do not count.

        map: 0 or more, 0 on padding. stride: pixels of the crop per position of the map.
        """
        map_Rhw = map_Rhw / map_Rhw.amax(dim=(1, 2), keepdim=True).clamp_min(1e-5)
        covered = (map_Rhw.shape[1] * stride, map_Rhw.shape[2] * stride)
        boxes = [batch.crop_boxes[image] for image in pairs.image_ids]
        stored = onto_stored_image(map_Rhw, boxes, covered, self.size)
        ids = np.stack([pairs.class_ids, image_ids(batch, pairs)], axis=1)
        levels = (255 * stored).round().to(torch.uint8)
        self.rows.propose(ids, levels, clock, weight=score_R >= self.gate)


def onto_stored_image(
    maps_Rhw: Tensor, boxes: Sequence[CropBox], crop_size: tuple[int, int], size: int
) -> Tensor:
    """Maps of crops -> maps [R, g, g] of the stored images, bilinear; 0 outside the crop.

    boxes: where each map's crop lies. crop_size: (height, width) of the crops in pixels.
    """
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    sides = torch.tensor(
        [[p.left, p.top, p.width, p.height, p.columns, p.rows] for p in boxes],
        dtype=torch.float64,
    ).reshape(-1, 6)
    flipped = torch.tensor([box.flipped for box in boxes], dtype=torch.bool)[:, None]
    x = (centre - sides[:, 0:1]) / sides[:, 2:3]  # within the crop's valid part, 0..1
    y = (centre - sides[:, 1:2]) / sides[:, 3:4]
    inside = ((y >= 0) & (y <= 1))[:, :, None] & ((x >= 0) & (x <= 1))[:, None, :]
    x = torch.where(flipped, 1 - x, x) * sides[:, 4:5] / crop_size[1]
    y = y * sides[:, 5:6] / crop_size[0]
    grid = torch.stack(
        [x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    grid = (2 * grid - 1).to(maps_Rhw.dtype)
    grid, inside = onto_device(maps_Rhw.device, grid.numpy(), inside.numpy())
    sampled = F.grid_sample(maps_Rhw[:, None], grid, padding_mode="border", align_corners=False)
    return sampled[:, 0] * inside
