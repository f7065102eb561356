"""From the activation maps of an image's classes to one label map, with doubtful pixels unknown.

    a_c   = the map of class c, resized to the image (bilinear), then stretched to 0..1
    bg    = (1 - max_c a_c)^4
    s     = DenseCRF(bg, a_1, ..., a_n)           marginals take the place of the scores
    s_bg  = 1 - saliency                          where a saliency map is given
    label = argmax over background and classes    ties: background, then the class given first

and a pixel becomes unknown by the first of these rules that holds (after `FusionConfig`'s names):

    conflict        more than one of the scores is above 0.9
    salient         the label is background, but the saliency is at least 32/255
    confident       the label is background, but some class scores above 0.8
    min_foreground  less than 1 % of the image is labelled as some class: all of it is unknown

Every step and number above is that of the code released with RCA (CVPR 2022); its paper states
none of them. Decided here: without saliency the background keeps the score that it has (its
marginal after the CRF); a map that is the same everywhere is no evidence and counts as zeros; an
image without classes is unknown throughout, since nothing says that it holds no object.

Marginals add up to 1 over the channels, so after the CRF a conflict is one between a class and the
saliency, and without saliency hardly a pixel is in doubt.

Shape letters: n classes of the image, C = n + 1 channels (background first), h x w positions of the
maps, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from memseg_dist.batch import IGNORE
from memseg_dist.checks import Positive, Share, check_numbers
from memseg_dist.nn.densecrf import CrfConfig, check_image, dense_crf

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class FusionConfig:
    """How maps become labels; the defaults are RCA's."""

    background_power: Positive | None = 4.0
    """The background's score is (1 - the largest class score) to this power; None: see below."""
    background_score: Share | None = None
    """The background's score where background_power is None: the same in every pixel."""
    zero_below: Share = 0.0
    """Class scores below this are set to 0 first."""
    use_crf: bool = True
    """Whether the marginals of a fully connected CRF replace the scores."""
    crf: CrfConfig = field(default_factory=CrfConfig)
    conflict: Share | None = 0.9
    """Unknown: pixels where two scores or more are above this. None: no such rule."""
    salient: Share | None = 32 / 255
    """Unknown: background pixels with at least this saliency. None: no such rule."""
    confident: Share | None = 0.8
    """Unknown: background pixels where a class scores above this. None: no such rule."""
    min_foreground: Share = 0.01
    """Unknown as a whole: images with a smaller share of labelled foreground. 0: no such rule."""

    def __post_init__(self) -> None:
        if (self.background_power is None) == (self.background_score is None):
            raise ValueError(
                f"fusion.background_power {self.background_power} and fusion.background_score "
                f"{self.background_score}: give one of them, and None for the other"
            )
        check_numbers(self, "fusion.")


RULES: Mapping[str, FusionConfig] = {
    "rca": FusionConfig(),
    "oaa": FusionConfig(zero_below=0.3, use_crf=False),
    "eps": FusionConfig(
        background_power=None,
        background_score=0.2,
        use_crf=False,
        conflict=None,
        salient=None,
        confident=None,
        min_foreground=0,
    ),
}
"""By whose label script. OAA: no CRF, and class scores below 0.3 do not count. EPS: a class
wherever one scores above 0.2, no CRF, nothing unknown, and no saliency map is given."""


class Fused(NamedTuple):
    """labels: int64 [H, W] of class ids, the background's id, or IGNORE.

    unknown: per rule how many pixels it made unknown; each counts for the first rule that held.
    num_without_evidence: maps that are the same everywhere.
    """

    labels: NDArray[np.int64]
    unknown: dict[str, int]
    num_without_evidence: int = 0


def fuse(
    maps: NDArray[np.generic],
    class_ids: Sequence[int],
    image: NDArray[np.uint8],
    saliency: NDArray[np.floating] | None,
    config: FusionConfig,
    *,
    background: int,
) -> Fused:
    """One label map from the maps [n, h, w] (uint8, or float of any range) of `class_ids` [n].

    image: uint8 [H, W, 3]; saliency: [H, W] in 0..1, or None; background: the id to write for it.
    ValueError for sizes that do not fit, and for ids that are given twice.
    """
    _check(maps, class_ids, image, saliency, background)
    size = image.shape[:2]
    num_pixels = size[0] * size[1]
    if not class_ids:
        labels = np.full(size, IGNORE, np.int64)
        return Fused(labels, {"without_classes": num_pixels})
    classes, num_empty = normalised(maps, size)
    scores = channel_scores(classes, image, saliency, config)
    ids = np.array([background, *class_ids], dtype=np.int64)
    labels = ids[scores.argmax(axis=0)]
    unknown = {}
    for rule, doubtful in _doubts(scores, labels == background, saliency, config).items():
        doubtful &= labels != IGNORE
        labels[doubtful] = IGNORE
        unknown[rule] = int(doubtful.sum())
    known = labels != IGNORE
    if (known & (labels != background)).sum() < config.min_foreground * num_pixels:
        unknown["min_foreground"] = int(known.sum())
        labels[:] = IGNORE
    return Fused(labels, unknown, num_empty)


def normalised(maps: NDArray[np.generic], size: tuple[int, int]) -> tuple[Scores, int]:
    """[n, h, w] -> float32 [n, H, W], each from 0 to 1 or all zero; how many are all zero."""
    small = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32))
    large = F.interpolate(small[None], size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    # By the small map: interpolating equal values may leave differences of one rounding.
    is_flat = (small.amax(dim=(1, 2)) == small.amin(dim=(1, 2))) | (high == low).flatten()
    span = torch.where(is_flat[:, None, None], torch.inf, high - low)
    return ((large - low) / span).numpy(), int(is_flat.sum())


def channel_scores(
    classes: Scores,
    image: NDArray[np.uint8],
    saliency: NDArray[np.floating] | None,
    config: FusionConfig,
) -> Scores:
    """Class scores [n, H, W] in 0..1 -> the scores that compete: [C, H, W], background first."""
    classes = np.where(classes < config.zero_below, np.float32(0), classes)
    if config.background_power is not None:
        background = (1 - classes.max(axis=0)) ** np.float32(config.background_power)
    else:
        assert config.background_score is not None
        background = np.full(image.shape[:2], config.background_score, np.float32)
    scores = np.concatenate([background[None], classes])
    if config.use_crf:
        scores = dense_crf(image, scores, config.crf)
    if saliency is not None:
        scores[0] = 1 - saliency
    return scores


def _doubts(
    scores: Scores,
    is_background: NDArray[np.bool_],
    saliency: NDArray[np.floating] | None,
    config: FusionConfig,
) -> dict[str, NDArray[np.bool_]]:
    """Per rule, in order, where it holds: bool [H, W]."""
    doubts = {}
    if config.conflict is not None:
        doubts["conflict"] = (scores > config.conflict).sum(axis=0) > 1
    if config.salient is not None and saliency is not None:
        doubts["salient"] = is_background & (saliency >= config.salient)
    if config.confident is not None:
        doubts["confident"] = is_background & (scores[1:] > config.confident).any(axis=0)
    return doubts


def _check(
    maps: NDArray[np.generic],
    class_ids: Sequence[int],
    image: NDArray[np.uint8],
    saliency: NDArray[np.floating] | None,
    background: int,
) -> None:
    check_image(image)
    if maps.ndim != 3 or len(maps) != len(class_ids) or (len(maps) and not maps.size):
        raise ValueError(
            f"maps {maps.shape} for {len(class_ids)} classes; they must be [classes, height, width]"
        )
    ids = [background, *class_ids]
    if len(set(ids)) < len(ids) or IGNORE in ids:
        raise ValueError(
            f"background {background} and classes {list(class_ids)} must differ, none be {IGNORE}"
        )
    if saliency is None:
        return
    if saliency.shape != image.shape[:2]:
        raise ValueError(
            f"the saliency map has {saliency.shape[0]} x {saliency.shape[1]} pixels, the image "
            f"{image.shape[0]} x {image.shape[1]}; write saliency at the images' size"
        )
    if not (saliency.min() >= 0 and saliency.max() <= 1):
        raise ValueError(
            f"saliency is from {saliency.min()} to {saliency.max()}; it must be from 0 to 1 "
            "(an 8-bit map divided by 255)"
        )
