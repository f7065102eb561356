"""Paired augmentation of an image, its mask and its saliency (LarvSeg's training pipeline).

Resize, random crop, flip, photometric distortion, padding to the crop at the right and bottom. All
randomness comes from the one seed that a call is given; no global generator is used or changed.

Deviations from the paper's code, each for a reason: images are resized with antialiasing (cv2's
bilinear aliases when it shrinks); padding is carried as `valid` instead of being seen as image; the
crop's class shares are counted at half its size, a quarter of the cost. Saturation and hue are
changed in 8-bit HSV as there, by Pillow, since torchvision blends with grey and is 8 times slower.
Shape letters: H x W pixels of the image as stored, C = crop.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from memseg_dist.batch import IGNORE, CropBox

_CROP_TRIES = 10
_BRIGHTNESS = 32.0  # added to 0..255
_GAIN = (0.5, 1.5)  # of contrast and of saturation
_HUE = 0.1  # of the colour circle: 18 in OpenCV's 8-bit hue, whose circle has 180


@dataclass(frozen=True)
class AugmentConfig:
    """resize: (long, short) sides that the image is made to fit at scale 1, keeping its ratio.

    scale_range: factors drawn uniformly. crop: side of the square output in pixels. flip: chance.
    category_max_ratio: a crop is drawn again (10 times at most) while one class covers this share
    of its known pixels; 1.0 = never look at the mask when choosing the crop.
    keep_ratio: False stretches every image to a square of crop x scale pixels, whatever its ratio,
    and `resize` is not used (RCA: 368 x 368 at scale 1).
    """

    resize: tuple[int, int] = (2048, 512)
    scale_range: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    flip: float = 0.5
    photometric: bool = True
    category_max_ratio: float = 0.75
    keep_ratio: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "resize", tuple(self.resize))
        object.__setattr__(self, "scale_range", tuple(self.scale_range))
        low, high = self.scale_range
        if not (min(self.resize) > 0 and 0 < low <= high and self.crop > 0):
            raise ValueError(
                f"augmentation: resize {self.resize}, scale_range {self.scale_range} and crop "
                f"{self.crop} must be positive, and the range ascending"
            )
        if not (0 <= self.flip <= 1 and 0 < self.category_max_ratio <= 1):
            raise ValueError(
                f"augmentation: flip {self.flip} is a chance in 0..1 and category_max_ratio "
                f"{self.category_max_ratio} a share above 0, at most 1"
            )


class Augmented(NamedTuple):
    """One crop and where it lies.

    image uint8 [3, C, C]; valid bool [C, C], False on padding; mask int32 [C, C] or None; saliency
    float32 [C, C] in 0..1, -1 on padding, or None.
    """

    image: Tensor
    valid: Tensor
    mask: Tensor | None
    crop_box: CropBox
    saliency: Tensor | None = None


def fitted_size(
    height: int, width: int, resize: tuple[int, int], scale: float = 1.0
) -> tuple[int, int]:
    """(height, width) with the same ratio that fit into `resize` = (long, short) x scale."""
    long, short = max(resize) * scale, min(resize) * scale
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resized_size(height: int, width: int, config: AugmentConfig, scale: float) -> tuple[int, int]:
    """(height, width) of the image that crops are cut from."""
    if config.keep_ratio:
        return fitted_size(height, width, config.resize, scale)
    side = max(1, int(config.crop * scale + 0.5))
    return side, side


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, *size], bilinear with antialiasing."""
    return functional.resize_image(image, list(size), antialias=True)


def nearest_indices(old: int, new: int) -> Tensor:
    """int64 [new]: the pixel of `old` that holds the centre of each new pixel."""
    return ((torch.arange(new) * 2 + 1) * old) // (2 * new)


def augment(
    image: Tensor,
    mask: Tensor | None,
    config: AugmentConfig,
    seed: int,
    crop_by_mask: bool = True,
    saliency: Tensor | None = None,
) -> Augmented:
    """image uint8 [3, H, W], mask int32 [H, W] -> one training crop, a pure function of the rest.

    crop_by_mask: whether `category_max_ratio` may look at the mask. saliency: uint8 [H, W], cut as
    the mask is; nothing is drawn for it, so the crop is the same with and without.
    """
    draw = random.Random(seed)  # its stream is the same in every version of Python
    crop = config.crop
    height, width = image.shape[1:]
    low, high = config.scale_range
    new_height, new_width = resized_size(height, width, config, low + (high - low) * draw.random())
    rows, columns = nearest_indices(height, new_height), nearest_indices(width, new_width)
    looked_at = mask if crop_by_mask and config.category_max_ratio < 1 else None
    top, left = _crop_box(rows, columns, looked_at, config, draw)
    image = resize_image(image, (new_height, new_width))
    image = image[:, top : top + crop, left : left + crop]
    rows, columns = rows[top : top + crop], columns[left : left + crop]
    flipped = draw.random() < config.flip
    if flipped:
        image, columns = functional.horizontal_flip_image(image), columns.flip(0)
    if config.photometric:
        image = distort_colours(image, draw)
    crop_box = CropBox(
        left / new_width,
        top / new_height,
        len(columns) / new_width,
        len(rows) / new_height,
        flipped,
        len(rows),
        len(columns),
    )
    return Augmented(
        image=_padded(image, crop, 0),
        valid=_padded(torch.ones(image.shape[1:], dtype=torch.bool), crop, False),
        mask=None if mask is None else _padded(mask[rows][:, columns], crop, IGNORE),
        crop_box=crop_box,
        saliency=None
        if saliency is None
        else _padded(saliency[rows][:, columns].float() / 255, crop, -1),
    )


def _crop_box(
    rows: Tensor, columns: Tensor, mask: Tensor | None, config: AugmentConfig, draw: random.Random
) -> tuple[int, int]:
    """The crop's top left corner in the resized image."""
    crop = config.crop
    spare_height, spare_width = max(len(rows) - crop, 0), max(len(columns) - crop, 0)

    def corner() -> tuple[int, int]:
        return int(draw.random() * (spare_height + 1)), int(draw.random() * (spare_width + 1))

    top, left = corner()
    if mask is None or spare_height == spare_width == 0:
        return top, left
    pixels, rows_at, columns_at = mask.numpy(), rows.numpy(), columns.numpy()
    for _ in range(_CROP_TRIES):
        seen = pixels[rows_at[top : top + crop : 2]][:, columns_at[left : left + crop : 2]]
        counts = np.bincount(seen[seen != IGNORE])
        if np.count_nonzero(counts) > 1 and counts.max() < config.category_max_ratio * counts.sum():
            break
        top, left = corner()
    return top, left


def distort_colours(image: Tensor, draw: random.Random) -> Tensor:
    """uint8 [3, H, W]: brightness, contrast (before or after the rest), saturation, hue."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * draw.random()

    def contrast(image: Tensor) -> Tensor:
        if draw.random() < 0.5:
            return functional.adjust_brightness_image(image, uniform(*_GAIN))  # a plain gain
        return image

    if draw.random() < 0.5:
        shift = round(uniform(-_BRIGHTNESS, _BRIGHTNESS))
        image = (image.to(torch.int16) + shift).clamp_(0, 255).to(torch.uint8)
    contrast_first = draw.random() < 0.5
    if contrast_first:
        image = contrast(image)
    gain = uniform(*_GAIN) if draw.random() < 0.5 else 1.0
    turn = uniform(-_HUE, _HUE) if draw.random() < 0.5 else 0.0
    if gain != 1 or turn != 0:
        image = _shift_colours(image, gain, turn)
    return image if contrast_first else contrast(image)


def _shift_colours(image: Tensor, gain: float, turn: float) -> Tensor:
    """uint8 [3, H, W] with saturation times `gain` and hue turned by `turn` of the circle."""
    hsv = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("HSV"))
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # wraps around, as the circle does
    scaled = np.clip(np.rint(np.arange(256) * gain), 0, 255).astype(np.uint8)
    hsv[..., 1] = scaled[hsv[..., 1]]
    pixels = np.array(Image.fromarray(hsv, mode="HSV").convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _padded(pixels: Tensor, crop: int, fill: int | bool) -> Tensor:
    """[..., h, w] -> [..., C, C] with `fill` at the right and bottom."""
    height, width = pixels.shape[-2:]
    padded = pixels.new_full((*pixels.shape[:-2], crop, crop), fill)
    padded[..., :height, :width] = pixels
    return padded
