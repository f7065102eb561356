"""The exact argmax over any vocabulary, at the image's own size, in bounded memory.

From low-resolution logits to labels everything but the argmax is linear: upsampling each window,
averaging overlapping windows, resizing to the original size, averaging the views (scales of the
image and their mirror images). So classes go through it a chunk at a time, with a running maximum;
no tensor of shape [classes, pixels] exists. Probabilities can be averaged over the views instead:
a pass over all classes before gives each view's normaliser. Only a dense CRF, where every pixel's
classes meet, needs the probabilities of all of them at once.

Shape letters: K classes, k classes of one chunk, windows of n x m pixels with h x w positions each,
Y x X pixels of a view of the image, H x W pixels of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as pictures

from memseg_dist.checks import check_pairs, check_scales, check_view, require
from memseg_dist.config import ValidationConfig
from memseg_dist.data.augment import fit_image, height_and_width, scaled_size, swap_ids
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.method import MATMUL_CLASSES, LinearLogits, Prediction
from memseg_dist.nn.densecrf import CrfConfig, dense_crf
from memseg_dist.nn.resize import upsample_positions

Predict = Callable[[Tensor, Tensor], Prediction]
Mode = Literal["whole", "slide"]
Average = Literal["logits", "probabilities"]

CRF_MAPS = 24
"""Maps [H, W] of 4 bytes that the CRF holds per class at its worst moment (measured on photographs
with `densecrf.DEEPLAB`)."""


@dataclass(frozen=True)
class Inference:
    """How a picture goes through a model: fitted to `resize`, then whole or in windows."""

    mode: Mode = "slide"
    resize: tuple[int, int] = (2048, 512)
    """Longest and shortest side that a picture is fitted to, by whoever reads it: `fitted`."""
    window: int | tuple[int, int] = 512
    """The side of a square, or (height, width); and so the stride."""
    stride: int | tuple[int, int] = 512
    scales: tuple[float, ...] = (1.0,)
    """Sizes of the picture to look at, relative to the fitted one; each is cut into windows."""
    flip: bool = False
    """Look at the mirror image of each size as well."""
    swap: tuple[tuple[int, int], ...] = ()
    """Label-space ids of classes that a mirror turns into each other (a left and a right arm)."""
    average: Average = "logits"
    """Over scales and mirror images: of the logits, or of their softmax over all classes."""
    memory_bytes: int = 512 * 2**20
    """Bound on what is held at once beyond the predictions (features of h x w x D per window, one
    set of class vectors, two with `swap`) and the maps [H, W] of the result (with "probabilities"
    one more per view). At least one class is processed at a time, so one class's maps (4 bytes x
    (Y X + H W), with several views 4 bytes x (Y X + 3 H W) of the largest) and the low-resolution
    logits of MATMUL_CLASSES classes are the floor."""
    keep_ratio: bool = True
    """Keep the picture's aspect ratio when it is fitted; else its sides become exactly `resize`."""
    crf: CrfConfig | None = None
    """Sharpen the probabilities by a dense CRF on the host, over the fitted picture brought to the
    result's size. `memory_bytes` must hold CRF_MAPS maps of every class."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        check_view(self.mode, self.resize, self.window, self.stride, "")
        check_scales(self.scales, "scales")
        check_pairs(self.swap, "swap")
        known = ("logits", "probabilities")
        require(self.average in known, "average", self.average, f"one of {known}")

    @classmethod
    def of(cls, settings: ValidationConfig, vocabulary: Vocabulary) -> Self:
        """As a run's validation looks at pictures; ValueError naming an unknown uid of its `swap`.

        vocabulary: that of the label space.
        """
        return cls(
            mode=settings.mode,
            resize=settings.resize,
            window=settings.window,
            stride=settings.stride,
            scales=settings.scales,
            flip=settings.flip,
            swap=vocabulary.index_pairs(settings.swap, "validation.swap"),
            average=settings.average,
            keep_ratio=settings.keep_ratio,
        )

    def fitted(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] at the size that it is looked at."""
        return fit_image(image, self.resize, keep_ratio=self.keep_ratio)

    @property
    def averages_probabilities(self) -> bool:
        """Of a single view the class with the largest logit is the most probable one anyway."""
        return self.average == "probabilities" and (self.flip or len(self.scales) > 1)


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
    """The image at one size, perhaps mirrored: its size Y, X, its windows with their predictions,
    and how many windows see each pixel [Y, X], None if there is one window.
    """

    size: tuple[int, int]
    is_mirrored: bool
    windows: list[Window]
    predictions: list[Prediction]
    coverage: Tensor | None

    def of(self, image: int) -> _View:
        return self._replace(predictions=[part.of(image) for part in self.predictions])


def windows(
    size: tuple[int, int], window: int | tuple[int, int], stride: int | tuple[int, int]
) -> list[Window]:
    """Windows that cover [height, width], row by row; the last of each axis is shifted inward.

    window, stride: a side, or (height, width). An axis shorter than the window gets one of its own
    length. Errors: ValueError.
    """
    sides, steps = height_and_width(window), height_and_width(stride)
    if not all(1 <= step <= side for side, step in zip(sides, steps)):
        raise ValueError(
            f"stride {stride} with window {window}: the stride must be from 1 to the window's "
            "size, else pixels between two windows would have no prediction"
        )
    rows, columns = (
        [*range(0, max(length - side, 0), step), max(length - side, 0)]
        for length, side, step in zip(size, sides, steps)
    )
    return [
        Window(top, left, min(top + sides[0], size[0]), min(left + sides[1], size[1]))
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
    """Per pixel the index into `classes` of the largest logit (or probability, `Inference.average`)
    averaged over the views: int64 [H, W]; ties: the first index.

    predict: uint8 [1, 3, n, m] and `classes` -> a Prediction, in which the vector of a class must
        depend on `classes` alone. Of a mirror image it is asked for the classes that
        `Inference.swap` puts in their places.
    image: uint8 [3, Y, X]; out_size: H, W of the result, default Y, X.
    """
    return _best_of_one(predict, image, classes, inference, out_size, confident=False)[0]


def segment_batch(
    predict: Predict,
    images: Tensor,
    classes: Tensor,
    inference: Inference,
    out_sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """`segment` for several images of one size, uint8 [B, 3, Y, X], which go through the network
    together. The predictions of all are held at once.
    """
    for size in out_sizes:
        _check_crf(inference, classes.numel(), size)
    views = _views(predict, images, classes, inference)
    return [
        _best([view.of(number) for view in views], image, inference, size, confident=False)[0]
        for number, (image, size) in enumerate(zip(images, out_sizes, strict=True))
    ]


def segment_confident(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference = WHOLE,
    out_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `segment`, with the softmax probability of the chosen class: float32 [H, W] in 0..1."""
    return _best_of_one(predict, image, classes, inference, out_size, confident=True)


def _best_of_one(
    predict: Predict,
    image: Tensor,
    classes: Tensor,
    inference: Inference,
    out_size: tuple[int, int] | None,
    confident: bool,
) -> tuple[Tensor, Tensor]:
    if image.dim() != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"image must be uint8 [3, height, width], got {image.dtype} {tuple(image.shape)}"
        )
    out_size = out_size or (image.shape[-2], image.shape[-1])
    _check_crf(inference, classes.numel(), out_size)
    views = _views(predict, image[None], classes, inference)
    return _best(views, image, inference, out_size, confident)


def _best(
    views: list[_View],
    image: Tensor,
    inference: Inference,
    out_size: tuple[int, int],
    confident: bool,
) -> tuple[Tensor, Tensor]:
    """The argmax and what it is the argmax of; `confident`: the probability, whatever it is."""
    best = torch.full(out_size, -torch.inf, device=image.device)
    label = torch.zeros(out_size, dtype=torch.int64, device=image.device)
    log_sum = torch.full_like(best, -torch.inf)
    by_probability = inference.averages_probabilities
    sums_logits = confident and not by_probability
    budget, halved = inference.memory_bytes, sums_logits or by_probability
    with torch.autocast(image.device.type, enabled=False):  # the argmax is exact in fp32 only
        normalisers = None
        if by_probability:
            normalisers = [torch.full_like(best, -torch.inf) for _ in views]
            for _, maps in _chunks(views, out_size, budget, halved):
                for view, low, normaliser in zip(views, maps, normalisers, strict=True):
                    of_view = _full_resolution(low, view, out_size).logsumexp(dim=0)
                    torch.logaddexp(normaliser, of_view, out=normaliser)
                del maps, low  # else two blocks would be held at once
        if inference.crf is not None:
            chunks = _chunks(views, out_size, budget, halved)
            every = [_mean_over_views(maps, views, out_size, normalisers) for _, maps in chunks]
            scores_KHW = torch.cat(every)
            if not by_probability:
                scores_KHW = scores_KHW.softmax(dim=0)
            return _sharpened(scores_KHW, image, inference.crf)
        for start, maps in _chunks(views, out_size, budget, halved):
            full = _mean_over_views(maps, views, out_size, normalisers)
            value, index = full.max(dim=0)
            if sums_logits:
                torch.logaddexp(log_sum, full.logsumexp(dim=0), out=log_sum)
            better = value > best  # strictly: of equal logits the earlier chunk keeps the pixel
            best = torch.where(better, value, best)
            label = torch.where(better, index + start, label)
            del full, maps
    return label, (best - log_sum).exp_() if sums_logits else best


def _check_crf(inference: Inference, num_classes: int, size: tuple[int, int]) -> None:
    needed = CRF_MAPS * 4 * num_classes * math.prod(size)
    if inference.crf is not None and needed > inference.memory_bytes:
        raise ValueError(
            f"a CRF over {num_classes} classes of {size[0]} x {size[1]} pixels takes about "
            f"{needed / 2**20:.0f} MiB, but only {inference.memory_bytes / 2**20:.0f} MiB are "
            "allowed; allow more (--memory), or ask for fewer classes"
        )


def _sharpened(
    probabilities_KHW: Tensor, image: Tensor, config: CrfConfig
) -> tuple[Tensor, Tensor]:
    """The class with the largest marginal of the CRF, and that marginal: [H, W] each."""
    shown = pictures.resize_image(image, list(probabilities_KHW.shape[1:]), antialias=True)
    picture = shown.permute(1, 2, 0).cpu().numpy()
    marginals = torch.from_numpy(dense_crf(picture, probabilities_KHW.cpu().numpy(), config))
    best, label = marginals.to(image.device).max(dim=0)
    return label, best


def _views(predict: Predict, images: Tensor, classes: Tensor, inference: Inference) -> list[_View]:
    """The predictions of every window of every view of uint8 images [B, 3, Y, X]."""
    if classes.numel() == 0:
        raise ValueError("no classes to choose from: `classes` is empty")
    shared: dict[bool, LinearLogits] = {}  # the class vectors, by whether they are swapped

    def predicted(crops: Tensor, is_mirrored: bool) -> Prediction:
        is_swapped = is_mirrored and len(inference.swap) > 0
        asked = swap_ids(classes, inference.swap) if is_swapped else classes
        prediction = predict(crops, asked)
        if isinstance(prediction, LinearLogits):
            first = shared.setdefault(is_swapped, prediction)
            prediction = replace(prediction, weight=first.weight, bias=first.bias)
        return prediction

    views: list[_View] = []
    for scale in inference.scales:
        size = scaled_size(images.shape[-2], images.shape[-1], scale)
        scaled = pictures.resize_image(images, list(size), antialias=True)
        parts = image_windows(size, inference)
        coverage = _coverage(parts, size, images.device)
        for is_mirrored in (False, True) if inference.flip else (False,):
            shown = scaled.flip(-1) if is_mirrored else scaled
            predictions = [
                predicted(shown[..., part.top : part.bottom, part.left : part.right], is_mirrored)
                for part in parts
            ]
            views.append(_View(size, is_mirrored, parts, predictions, coverage))
    return views


def _chunks(
    views: list[_View], out_size: tuple[int, int], memory_bytes: int, halved: bool
) -> Iterator[tuple[int, list[list[Tensor]]]]:
    """The first class of each chunk, and its low-resolution logits [k, h, w] by view and window.

    halved: use half of the memory; a sum of exponentials takes as much again.
    """
    num_classes = views[0].predictions[0].num_classes
    for block in range(0, num_classes, MATMUL_CLASSES):
        block_stop = min(block + MATMUL_CLASSES, num_classes)
        low = [[part.chunk(block, block_stop)[0] for part in view.predictions] for view in views]
        chunk = _chunk_size(views, low, out_size, memory_bytes)
        if halved:
            chunk = max(1, chunk // 2)
        for start in range(block, block_stop, chunk):
            stop = min(start + chunk, block_stop)
            yield start, [[maps[start - block : stop - block] for maps in view] for view in low]
        del low  # else two blocks would be held at once


def _mean_over_views(
    maps: list[list[Tensor]],
    views: list[_View],
    out_size: tuple[int, int],
    normalisers: list[Tensor] | None,
) -> Tensor:
    """[k, H, W]: the mean logits, or with `normalisers` (one [H, W] per view) probabilities."""

    def of_view(number: int) -> Tensor:
        full = _full_resolution(maps[number], views[number], out_size)
        return full if normalisers is None else full.sub_(normalisers[number]).exp_()

    total = of_view(0)
    for number in range(1, len(views)):
        total += of_view(number)
    return total if len(views) == 1 else total.div_(len(views))


def _full_resolution(maps: list[Tensor], view: _View, out_size: tuple[int, int]) -> Tensor:
    """Low-resolution logits [k, h, w] of each window of a view -> [k, H, W], not mirrored."""
    if view.coverage is None:
        total = upsample_positions(maps[0], view.size, view.predictions[0].stride)
    else:
        total = maps[0].new_zeros(maps[0].shape[0], *view.size)
        for logits, part, found in zip(maps, view.windows, view.predictions, strict=True):
            up = upsample_positions(logits, part.size, found.stride)
            total[:, part.top : part.bottom, part.left : part.right] += up
        del up
        total /= view.coverage
    if out_size != view.size:
        total = F.interpolate(total[None], size=out_size, mode="bilinear", align_corners=False)[0]
    return total.flip(-1) if view.is_mirrored else total


def _coverage(parts: list[Window], size: tuple[int, int], device: torch.device) -> Tensor | None:
    """How many windows see each pixel [Y, X]; None if a single one does."""
    if len(parts) == 1:
        return None
    count = torch.zeros(size, device=device)
    for part in parts:
        count[part.top : part.bottom, part.left : part.right] += 1
    return count


def _chunk_size(
    views: list[_View],
    low: list[list[Tensor]],
    out_size: tuple[int, int],
    memory_bytes: int,
) -> int:
    """Classes at a time: bytes left beside the low-resolution block, over one class's maps."""
    per_class = 0
    for view in views:
        pixels = max(math.prod(part.size) for part in view.windows)
        pixels += math.prod(view.size) if len(view.windows) > 1 else 0
        pixels += math.prod(out_size) if out_size != view.size else 0
        per_class = max(per_class, pixels)
    if len(views) > 1:
        per_class += 2 * math.prod(out_size)  # the sum over the views; a mirrored copy
    block = MATMUL_CLASSES * sum(maps[0].numel() for view in low for maps in view)
    comparison = 6 * math.prod(out_size)  # a chunk's maximum, its int64 index, their merged copies
    left = memory_bytes // 4 - block - comparison
    return max(1, min(MATMUL_CLASSES, left // per_class))
