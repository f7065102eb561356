"""Where an image shows its classes: the maps of a training run, or those of its final weights.

    maps = AccumulatedMaps(checkpoint.reader("maps"))("2007_000032", [3, 7])
    maps = predicted_maps(method, image, [3, 7], scales=(0.5, 1.0), flip=True)

Shape letters: n classes asked for, T maps of the run, g x g places of a map, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.data.augment import resize_image, scaled_size
from memseg_dist.memory.layouts import NO_ROW, Regions, image_id
from memseg_dist.memory.state import Reader
from memseg_dist.methods.method import Method, evaluation_mode
from memseg_dist.nn.resize import upsample_positions


class Activation(NamedTuple):
    """maps: [n, h, w], uint8 or float32, stretched over the image; num_missing of them are zeros
    because the run never wrote them.
    """

    maps: NDArray[np.generic]
    num_missing: int = 0


class AccumulatedMaps:
    """The maps that a run kept in its memory "maps", by (class, key of the image).

    read: of a checkpoint ("class", "image", "updates" [T] and "rows" [T, g, g]). Maps are read
    when they are asked for, one by one; preload: all of them now, for files that are far away.
    """

    def __init__(self, read: Reader, *, preload: bool = False) -> None:
        classes, images = read("class").numpy(), read("image").numpy()
        self._regions = Regions(int(classes.max(initial=-1)) + 1, classes, images)
        self._updates = read("updates").numpy()
        self._read = read
        self._all = read("rows") if preload else None
        self._size = tuple(read("rows", 0, min(1, len(classes))).shape[1:])

    def __call__(self, key: str, classes: Sequence[int]) -> Activation:
        """uint8 [n, g, g] of label-space ids."""
        maps = np.zeros((len(classes), *self._size), np.uint8)
        num_missing = 0
        for number, class_id in enumerate(classes):
            row = self._row(class_id, key)
            if row == NO_ROW or self._updates[row] == 0:
                num_missing += 1
            else:
                maps[number] = self._map(row)
        return Activation(maps, num_missing)

    def _row(self, class_id: int, key: str) -> int:
        if class_id >= self._regions.num_classes:
            return NO_ROW
        return int(self._regions.find(np.array([[class_id, image_id(key)]]))[0])

    def _map(self, row: int) -> NDArray[np.uint8]:
        rows = self._read("rows", row, row + 1) if self._all is None else self._all[row : row + 1]
        return rows[0].numpy()


def predicted_maps(
    method: Method,
    image: Tensor,
    classes: Sequence[int],
    *,
    scales: Sequence[float],
    flip: bool,
    activations: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Activation:
    """Class activation maps at several scales, added up as EPS does: float32 [n, H, W] in 0..1.

    image: uint8 [3, H, W]. At each scale of the image, mirrored too if `flip`, a class's map is its
    `activations` (the method's own by default) over their maximum; the maps are enlarged, added up
    and divided by their maximum.
    """
    height, width = image.shape[-2:]
    total = torch.zeros(len(classes), height, width)
    if not classes:
        return Activation(total.numpy())
    device = next(method.parameters()).device
    ids = torch.tensor(list(classes), device=device)
    look = activations or method.activations
    with evaluation_mode(method):
        for scale in scales:
            size = scaled_size(height, width, scale)
            small = resize_image(image, size).to(device)
            views = torch.stack([small, small.flip(-1)] if flip else [small])
            maps = _by_maximum(look(views, ids).float())
            for number, low in enumerate(maps):
                up = upsample_positions(low, size, method.stride)
                up = up.flip(-1) if number else up  # after padding is cut off, so halves meet
                total += F.interpolate(up[None], (height, width), mode="bilinear")[0].cpu()
    return Activation(_by_maximum(total).numpy())


def _by_maximum(maps: Tensor) -> Tensor:
    """[..., h, w] of 0 or more, each divided by its maximum; zeros stay zeros."""
    highest = maps.amax(dim=(-2, -1), keepdim=True)
    return maps / torch.where(highest > 0, highest, 1)
