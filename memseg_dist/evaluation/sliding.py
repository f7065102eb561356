"""The exact argmax over any vocabulary, at the image's own size, in bounded memory.

From low-resolution logits to labels everything but the argmax is linear: upsampling each window,
averaging overlapping windows, resizing to the original size. So classes go through it a chunk at a
time, with a running maximum; no tensor of shape [classes, pixels] exists.

Shape letters: K classes, k classes of one chunk, windows of n x m pixels with h x w positions each,
Y x X pixels of the image given to the model, H x W pixels of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.methods.method import MATMUL_CLASSES, LinearLogits, Prediction
from memseg_dist.nn.resize import upsample_positions

Predict = Callable[[Tensor, Tensor], Prediction]
Mode = Literal["whole", "slide"]


@dataclass(frozen=True)
class Inference:
    """How a picture goes through a model: fitted to `resize`, then whole or in windows."""

    mode: Mode = "slide"
    resize: tuple[int, int] = (2048, 512)
    """Longest and shortest side that a picture is fitted to, by whoever reads it."""
    window: int = 512
    stride: int = 512
    memory_bytes: int = 512 * 2**20
    """Bound on what is held at once beyond the predictions (features of h x w x D per window, one
    set of class vectors) and the maps [H, W] of the result. At least one class is processed at a
    time, so one class's maps (4 bytes x (Y X + H W)) are the floor."""


SLIDE, WHOLE = Inference(), Inference(mode="whole")


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


class _View(NamedTuple):
    window: Window
    prediction: Prediction


def windows(size: tuple[int, int], window: int, stride: int) -> list[Window]:
    """Windows that cover [height, width], row by row; the last of each axis is shifted inward.

    An axis shorter than `window` gets one window of its own length. Errors: ValueError.
    """
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(
            f"stride {stride} with window {window}: the stride must be from 1 to the window's "
            "size, else pixels between two windows would have no prediction"
        )
    rows, columns = (
        [*range(0, max(length - window, 0), stride), max(length - window, 0)] for length in size
    )
    return [
        Window(top, left, min(top + window, size[0]), min(left + window, size[1]))
        for top in rows
        for left in columns
    ]


def image_windows(size: tuple[int, int], inference: Inference) -> list[Window]:
    """The windows of an image of [height, width] pixels: a single one for mode "whole"."""
    if inference.mode not in ("whole", "slide"):
        raise ValueError(f"mode {inference.mode!r}: use 'whole' or 'slide'")
    if inference.mode == "whole":
        return [Window(0, 0, *size)]
    return windows(size, inference.window, inference.stride)


def segment(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """Per pixel the index into `classes` of the largest logit: int64 [H, W]; ties: the first index.

    predict: uint8 [1, 3, n, m] and `classes` -> a Prediction, in which the vector of a class must
        depend on `classes` alone.
    image: uint8 [3, Y, X]; out_size: H, W of the result, default Y, X.
    """
    return _best(predict, image, classes, inference, out_size)[0]


def segment_confident(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `segment`, with the softmax probability of the chosen class: float32 [H, W] in 0..1."""
    log_sum = torch.full(out_size or image.shape[-2:], -torch.inf, device=image.device)
    label, best = _best(predict, image, classes, inference, out_size, log_sum)
    return label, (best - log_sum).exp_()


def _best(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference,
    out_size: tuple[int, int] | None,
    log_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The argmax and the largest logit; log sum exp over the classes is added to `log_sum`."""
    views = _views(predict, image, classes, inference)
    size = (image.shape[-2], image.shape[-1])
    out_size = out_size or size
    best = torch.full(out_size, -torch.inf, device=image.device)
    label = torch.zeros(out_size, dtype=torch.int64, device=image.device)
    coverage = _coverage(views, size, best)
    num_classes = views[0].prediction.num_classes
    with torch.autocast(image.device.type, enabled=False):  # the argmax is exact in fp32 only
        for block in range(0, num_classes, MATMUL_CLASSES):
            block_stop = min(block + MATMUL_CLASSES, num_classes)
            low = [view.prediction.chunk(block, block_stop)[0] for view in views]
            chunk = _chunk_size(views, low, size, out_size, inference.memory_bytes)
            if log_sum is not None:
                chunk = max(1, chunk // 2)  # the exponentials take as much again
            for start in range(block, block_stop, chunk):
                stop = min(start + chunk, block_stop)
                maps = [logits[start - block : stop - block] for logits in low]
                full = _full_resolution(maps, views, coverage, size, out_size)
                value, index = full.max(dim=0)
                if log_sum is not None:
                    torch.logaddexp(log_sum, full.logsumexp(dim=0), out=log_sum)
                better = value > best  # strictly: of equal logits the earlier chunk keeps the pixel
                best = torch.where(better, value, best)
                label = torch.where(better, index + start, label)
                del full
            del low, maps  # else two blocks would be held at once
    return label, best


def _views(predict: Predict, image: Tensor, classes: Tensor, inference: Inference) -> list[_View]:
    """The prediction of every window."""
    if image.dim() != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"image must be uint8 [3, height, width], got {image.dtype} {tuple(image.shape)}"
        )
    if classes.numel() == 0:
        raise ValueError("no classes to choose from: `classes` is empty")
    views: list[_View] = []
    for part in image_windows((image.shape[-2], image.shape[-1]), inference):
        crop = image[None, :, part.top : part.bottom, part.left : part.right]
        prediction = predict(crop, classes)
        if views and isinstance(prediction, LinearLogits):  # all windows share one set of vectors
            first = views[0].prediction
            assert isinstance(first, LinearLogits)
            prediction = replace(prediction, weight=first.weight, bias=first.bias)
        views.append(_View(part, prediction))
    return views


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
    if out_size == size:
        return total
    return F.interpolate(total[None], size=out_size, mode="bilinear", align_corners=False)[0]


def _coverage(views: list[_View], size: tuple[int, int], like: Tensor) -> Tensor | None:
    """How many windows see each pixel [Y, X]; None if a single one does."""
    if len(views) == 1:
        return None
    count = like.new_zeros(size)
    for part, _ in views:
        count[part.top : part.bottom, part.left : part.right] += 1
    return count


def _chunk_size(
    views: list[_View],
    low: list[Tensor],
    size: tuple[int, int],
    out_size: tuple[int, int],
    memory_bytes: int,
) -> int:
    """Classes at a time: bytes left beside the low-resolution block, over one class's maps."""
    pixels = [math.prod(view.window.size) for view in views]
    per_class = max(pixels) + (math.prod(size) if len(views) > 1 else 0)
    if out_size != size:
        per_class += math.prod(out_size)
    block = MATMUL_CLASSES * sum(maps[0].numel() for maps in low)
    comparison = 6 * math.prod(out_size)  # a chunk's maximum, its int64 index, their merged copies
    left = memory_bytes // 4 - block - comparison
    return max(1, min(MATMUL_CLASSES, left // per_class))
