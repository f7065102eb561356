"""The strong view of a slot: colour jitter, then CutOut. Nothing moves, so no label has to.

    view = strong_view(images, valid, seed)
    logits = net(view.images, valid & ~view.cut)       # what was cut out is the backbone's grey

The parameters are drawn on the host from one seed; the pictures stay on the device. Unlike
torchvision's ColorJitter, brightness is added (or, by a flag, multiplied as there), contrast turns
about the mean of each channel, and saturation is that of HSV.

Shape letters: B images, H x W pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

Brightness = Literal["additive", "multiplicative"]


class StrongView(NamedTuple):
    """images: float32 [B, 3, H, W] in 0..255. cut: bool [B, H, W], True in the cut-out box."""

    images: Tensor
    cut: Tensor


def strong_view(
    images: Tensor,
    valid: Tensor,
    seed: int,
    *,
    strength: float = 0.5,
    brightness: Brightness = "additive",
    cutout: float = 0.19,
) -> StrongView:
    """images: uint8 [B, 3, H, W]; valid: bool [B, H, W], False on padding.

    strength: see `jitter`. cutout: side of the box, a share of the crop's; 0: no box.
    """
    draw = random.Random(seed)
    pixels = [
        jitter(image, where, draw, strength, brightness)
        for image, where in zip(images.float() / 255, valid, strict=True)
    ]
    cut = torch.zeros_like(valid)
    for own in cut:
        rows, columns = cutout_box(tuple(own.shape), cutout, draw)
        own[rows, columns] = True
    return StrongView(255 * torch.stack(pixels), cut)


def jitter(
    image: Tensor, valid: Tensor, draw: random.Random, strength: float, brightness: Brightness
) -> Tensor:
    """float [3, H, W] in 0..1 under four changes in a random order, clipped after each.

    strength s: brightness is shifted by U(-s, s), contrast and saturation are scaled by
    U(1 - s, 1 + s), and hue is turned by U(-s / 2, s / 2) of the circle.
    """

    def uniform(middle: float, width: float) -> float:
        return middle + width * (2 * draw.random() - 1)

    brighten = partial(torch.add, other=uniform(0, strength))
    if brightness == "multiplicative":
        brighten = partial(torch.mul, other=uniform(1, strength))
    changes: list[Callable[[Tensor], Tensor]] = [
        brighten,
        partial(adjust_contrast, valid=valid, factor=uniform(1, strength)),
        partial(adjust_saturation, factor=uniform(1, strength)),
        partial(functional.adjust_hue, hue_factor=uniform(0, strength / 2)),
    ]
    # `shuffle` may draw otherwise in another version of Python; `random` does not
    for _, change in sorted((draw.random(), number) for number in range(len(changes))):
        image = changes[change](image).clamp(0, 1)
    return image


def adjust_contrast(image: Tensor, *, valid: Tensor, factor: float) -> Tensor:
    """Away from or towards the mean of each channel [3, H, W] over the valid pixels."""
    mean_3 = (image * valid).sum(dim=(1, 2)) / valid.sum().clamp_min(1)
    return torch.lerp(mean_3[:, None, None], image, factor)


def adjust_saturation(image: Tensor, *, factor: float) -> Tensor:
    """HSV's saturation times `factor`, at most 1, hue and value kept: [3, H, W] in 0..1.

    In HSV a channel is V (1 - S k) with k by the hue alone, so S' = f S is x' = V - f (V - x); and
    S' <= 1 is f <= 1 / S = V / (V - min).
    """
    value, lowest = image.amax(dim=0), image.amin(dim=0)
    spread = value - lowest
    at_most = torch.where(spread > 0, value / spread.clamp_min(1e-12), 1.0)
    return value - at_most.clamp_max(factor) * (value - image)


def cutout_box(size: tuple[int, ...], share: float, draw: random.Random) -> tuple[slice, slice]:
    """Rows and columns of a box whose centre is anywhere in the crop; it ends at the border."""
    spans = []
    for side in size:
        half, centre = round(share * side / 2), int(draw.random() * side)
        spans.append(slice(max(0, centre - half), min(side, centre + half)))
    return spans[0], spans[1]
