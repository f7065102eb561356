"""The exact argmax over any vocabulary, at the image's own size, in bounded memory.

From low-resolution logits to labels everything but the argmax is linear: upsampling each window,
averaging overlapping windows, resizing to the original size. So classes go through it a chunk at a
time, with a running maximum; no tensor of shape [classes, pixels] exists.

Shape letters: K classes, k classes of one chunk, D channels, N windows of n x m pixels with h x w
features each, Y x X pixels of the image given to the model, H x W pixels of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.methods.method import LinearLogits

Predict = Callable[[Tensor, Tensor], LinearLogits]
Mode = Literal["whole", "slide"]

DEFAULT_MEMORY_BYTES = 512 * 2**20
MATMUL_CLASSES = 256
"""Classes per matrix product. Always this many (padded), whatever the chunk: a product of another
shape may round otherwise, and then equal classes would not tie."""


@dataclass(frozen=True, slots=True)
class Window:
    """Rows [top, bottom) and columns [left, right) of the image."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


@dataclass(frozen=True)
class _View:
    """One window's features [D, h * w] and the size [h, w] they are to be unfolded to."""

    window: Window
    features: Tensor
    grid: tuple[int, int]


def windows(size: tuple[int, int], window: int, stride: int) -> list[Window]:
    """Windows that cover [height, width], row by row; the last of each axis is shifted inward.

    An axis shorter than `window` gets one window of its own length. Errors: ValueError.
    """
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(
            f"stride {stride} with window {window}: the stride must be from 1 to the window's "
            "size, else pixels between two windows would have no prediction"
        )
    rows, columns = (_starts(length, window, stride) for length in size)
    return [
        Window(top, left, min(top + window, size[0]), min(left + window, size[1]))
        for top in rows
        for left in columns
    ]


def segment(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    *,
    mode: Mode = "whole",
    window: int = 512,
    stride: int = 512,
    out_size: tuple[int, int] | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Tensor:
    """Per pixel the index into `classes` of the largest logit: int64 [H, W]; ties: the first index.

    predict: uint8 [1, 3, n, m] and `classes` -> LinearLogits whose weight and bias depend on the
        classes alone.
    image: uint8 [3, Y, X]; out_size: H, W of the result, default Y, X.
    memory_bytes: bound on what is held at once beyond the features (h x w x D per window) and the
        two [H, W] maps of the result; at least one class is processed at a time, so one class's
        maps (4 bytes x (Y X + H W)) are the floor.
    """
    views, head = _views(predict, image, classes, mode, window, stride)
    with torch.autocast(image.device.type, enabled=False):  # the argmax is exact in fp32 only
        return _argmax(views, head, (image.shape[-2], image.shape[-1]), out_size, memory_bytes)


def segment_dense(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    *,
    mode: Mode = "whole",
    window: int = 512,
    stride: int = 512,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """The slow twin of `segment`: all K classes at full size, as the definition has it."""
    size = (image.shape[-2], image.shape[-1])
    area = [Window(0, 0, *size)] if mode == "whole" else windows(size, window, stride)
    total = torch.zeros(len(classes), *size)
    count = torch.zeros(size)
    for part in area:
        crop = image[None, :, part.top : part.bottom, part.left : part.right]
        dense = predict(crop, classes).dense().to("cpu", torch.float32)
        up = upsample_positions(dense[0], part.size)
        total[:, part.top : part.bottom, part.left : part.right] += up
        count[part.top : part.bottom, part.left : part.right] += 1
    average = total / count
    if out_size is not None and out_size != size:
        average = _resize(average, out_size)
    return average.argmax(dim=0)


def _argmax(
    views: list[_View],
    head: LinearLogits,
    size: tuple[int, int],
    out_size: tuple[int, int] | None,
    memory_bytes: int,
) -> Tensor:
    out_size = out_size or size
    chunk = _chunk_size(views, size, out_size, memory_bytes)
    best = torch.full(out_size, -torch.inf, dtype=head.weight.dtype, device=head.weight.device)
    label = torch.zeros(out_size, dtype=torch.int64, device=head.weight.device)
    coverage = _coverage(views, size, best)
    num_classes = head.weight.shape[0]
    for block in range(0, num_classes, MATMUL_CLASSES):
        low = [_low_resolution(view, head, block) for view in views]
        block_stop = min(block + MATMUL_CLASSES, num_classes)
        for start in range(block, block_stop, chunk):
            stop = min(start + chunk, block_stop)
            maps = [logits[start - block : stop - block] for logits in low]
            value, index = _full_resolution(maps, views, coverage, size, out_size).max(dim=0)
            better = value > best  # strictly: of equal logits the earlier chunk keeps the pixel
            best = torch.where(better, value, best)
            label = torch.where(better, index + start, label)
        del low, maps  # else two blocks would be held at once
    return label


def _views(
    predict: Predict, image: Tensor, classes: Tensor, mode: Mode, window: int, stride: int
) -> tuple[list[_View], LinearLogits]:
    """The features of every window, in fp32, and the head that all of them share."""
    if image.dim() != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"image must be uint8 [3, height, width], got {image.dtype} {tuple(image.shape)}"
        )
    if classes.numel() == 0:
        raise ValueError("no classes to choose from: `classes` is empty")
    if mode not in ("whole", "slide"):
        raise ValueError(f"mode {mode!r}: use 'whole' or 'slide'")
    size = (image.shape[-2], image.shape[-1])
    area = [Window(0, 0, *size)] if mode == "whole" else windows(size, window, stride)
    views = []
    for part in area:
        crop = image[None, :, part.top : part.bottom, part.left : part.right]
        head = predict(crop, classes)
        grid = (head.features.shape[-2], head.features.shape[-1])
        views.append(_View(part, head.features[0].float().flatten(1), grid))
    bias = None if head.bias is None else head.bias.float()
    return views, LinearLogits(head.features, head.weight.float(), bias)


def _low_resolution(view: _View, head: LinearLogits, start: int) -> Tensor:
    """Logits [MATMUL_CLASSES, h, w] of the classes from `start` on, then zeros."""
    weight = head.weight[start : start + MATMUL_CLASSES]
    missing = MATMUL_CLASSES - weight.shape[0]
    logits = F.pad(weight, (0, 0, 0, missing)) @ view.features
    if head.bias is not None:
        bias = head.bias[start : start + MATMUL_CLASSES]
        logits += F.pad(bias, (0, missing))[:, None]
    return logits.unflatten(1, view.grid)


def _full_resolution(
    maps: list[Tensor],
    views: list[_View],
    coverage: Tensor | None,
    size: tuple[int, int],
    out_size: tuple[int, int],
) -> Tensor:
    """Low-resolution logits [k, h, w] of each window -> [k, H, W]."""
    if coverage is None:
        total = upsample_positions(maps[0], size)
    else:
        total = maps[0].new_zeros(maps[0].shape[0], *size)
        for logits, view in zip(maps, views, strict=True):
            part = view.window
            up = upsample_positions(logits, part.size)
            total[:, part.top : part.bottom, part.left : part.right] += up
        total /= coverage
    return total if out_size == size else _resize(total, out_size)


def upsample_positions(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[k, h, w] -> [k, n, m], where h x w positions come from an image of n x m pixels."""
    return _resize(maps, padded_size(maps, size))[:, : size[0], : size[1]]


def padded_size(maps: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """The pixels that the h x w positions of `maps` [k, h, w] span: n x m plus the net's padding.

    A backbone of stride s that pads its input has ceil(n / s) rows of features: they span whole
    strides. Rows that fit no such s span n.
    """
    return _padded_length(maps.shape[-2], size[0]), _padded_length(maps.shape[-1], size[1])


def _padded_length(num_positions: int, length: int) -> int:
    stride = -(-length // num_positions)
    padded = num_positions * stride
    return padded if padded - stride < length else length


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def _coverage(views: Sequence[_View], size: tuple[int, int], like: Tensor) -> Tensor | None:
    """How many windows see each pixel [Y, X]; None if a single one does."""
    if len(views) == 1:
        return None
    count = like.new_zeros(size)
    for view in views:
        part = view.window
        count[part.top : part.bottom, part.left : part.right] += 1
    return count


def _chunk_size(
    views: Sequence[_View], size: tuple[int, int], out_size: tuple[int, int], memory_bytes: int
) -> int:
    """Classes at a time: bytes left beside the low-resolution block, over one class's maps."""
    pixels = [_area(view.window.size) for view in views]
    per_class = max(pixels) + (_area(size) if len(views) > 1 else 0)
    if out_size != size:
        per_class += _area(out_size)
    block = MATMUL_CLASSES * sum(_area(view.grid) for view in views)
    comparison = 6 * _area(out_size)  # a chunk's maximum, its int64 index, and their merged copies
    left = memory_bytes // 4 - block - comparison
    return max(1, min(MATMUL_CLASSES, left // per_class))


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
