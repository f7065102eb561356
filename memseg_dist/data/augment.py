"""Paired augmentation of an image, its masks and its saliency (LarvSeg's training pipeline).

Resize, random crop, flip, rotation, photometric distortion, padding to the crop at the right and
bottom. All randomness comes from the one seed that a call is given; no global generator is used or
changed.

Deviations from the paper's code, each for a reason: images are resized with antialiasing (cv2's
bilinear aliases when it shrinks); padding is carried as `valid` instead of being seen as image; the
crop's class shares are counted at half its size, a quarter of the cost. Saturation and hue are
changed in OpenCV's 8-bit HSV as there, with 256 levels of hue where it has 180.
Shape letters: H x W pixels of the image as stored, Y x X of the crop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE, CropBox

_CROP_TRIES = 10
_BRIGHTNESS = 32.0  # added to 0..255
_GAIN = (0.5, 1.5)  # of contrast and of saturation
_HUE = 0.1  # of the colour circle: 18 in OpenCV's 8-bit hue, whose circle has 180

cv2.setNumThreads(1)  # loader processes are what shares the cores


@dataclass(frozen=True)
class AugmentConfig:
    """How an image, its masks and its saliency become a crop."""

    resize: tuple[int, int] = (2048, 512)
    """Longest and shortest side that an image is fitted to, at scale 1."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Least and greatest factor on these sides, drawn uniformly."""
    crop: int | tuple[int, int] = 512
    """Side of the square crop in pixels, or its height and width."""
    flip: float = 0.5
    """Share of the crops that are mirrored, 0 to 1."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue at random."""
    category_max_ratio: float = 0.75
    """A crop is drawn again (10 times at most) while one class covers this share of its known
    pixels; 1.0: the mask is never looked at when choosing the crop."""
    keep_ratio: bool = True
    """Keep the image's aspect ratio; else its sides become exactly `resize` ((520, 520): a
    square)."""
    rotate: float = 0.0
    """Crops are turned about their centre by an angle drawn uniformly from -rotate..rotate degrees.
    A turned crop shows what of the image is there, beyond the sides of the straight crop too; what
    lies outside the image is padding."""
    rotate_chance: float = 0.5
    """Share of the crops that are turned, 0 to 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "resize", tuple(self.resize))
        object.__setattr__(self, "scale_range", tuple(self.scale_range))
        if not isinstance(self.crop, int):
            object.__setattr__(self, "crop", tuple(self.crop))
        low, high = self.scale_range
        if not (min(self.resize) > 0 and 0 < low <= high and min(self.crop_size) > 0):
            raise ValueError(
                f"augmentation: resize {self.resize}, scale_range {self.scale_range} and crop "
                f"{self.crop} must be positive, and the range ascending"
            )
        if not (0 <= self.flip <= 1 and 0 < self.category_max_ratio <= 1):
            raise ValueError(
                f"augmentation: flip {self.flip} is a chance in 0..1 and category_max_ratio "
                f"{self.category_max_ratio} a share above 0, at most 1"
            )
        if not (0 <= self.rotate <= 180 and 0 <= self.rotate_chance <= 1):
            raise ValueError(
                f"augmentation: rotate {self.rotate} is an angle of 0..180 degrees and "
                f"rotate_chance {self.rotate_chance} a chance in 0..1"
            )

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height, width)"""
        return height_and_width(self.crop)


class Augmented(NamedTuple):
    """One crop and where it lies.

    image uint8 [3, Y, X]; valid bool [Y, X], False on padding; mask int32 [Y, X] or None; saliency
    float32 [Y, X] in 0..1, -1 on padding, or None; pseudo_mask as mask. crop_box: with `rotate`,
    where the crop lay before it was turned.
    """

    image: Tensor
    valid: Tensor
    mask: Tensor | None
    crop_box: CropBox
    saliency: Tensor | None = None
    pseudo_mask: Tensor | None = None


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Of a square given by its side, or as they are."""
    return (size, size) if isinstance(size, int) else size


def fitted_size(
    height: int, width: int, resize: tuple[int, int], scale: float = 1.0
) -> tuple[int, int]:
    """(height, width) with the same ratio that fit into `resize` = (long, short) x scale."""
    long, short = max(resize) * scale, min(resize) * scale
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(height, width) times `scale`, rounded, at least 1."""
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resized_size(
    height: int, width: int, resize: tuple[int, int], scale: float = 1.0, *, keep_ratio: bool
) -> tuple[int, int]:
    """(height, width) of the image that crops are cut from: see `AugmentConfig`."""
    if keep_ratio:
        return fitted_size(height, width, resize, scale)
    long, short = max(resize), min(resize)
    sides = (long, short) if height > width else (short, long)
    return scaled_size(*sides, scale)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] on the CPU -> uint8 [3, *size], bilinear with antialiasing."""
    # A batch that torch knows to be channels_last is resized, and stays so, without a copy.
    batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]


def fit_image(image: Tensor, resize: tuple[int, int], *, keep_ratio: bool = True) -> Tensor:
    """uint8 [3, H, W] as it is tested: at `resize` = (long, short), its ratio kept or not."""
    size = resized_size(image.shape[-2], image.shape[-1], resize, keep_ratio=keep_ratio)
    return resize_image(image, size)


def nearest_indices(old: int, new: int) -> Tensor:
    """int64 [new]: the pixel of `old` that holds the centre of each new pixel."""
    return ((torch.arange(new) * 2 + 1) * old) // (2 * new)


def swap_ids(ids: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """`ids` with the two of each pair in each other's place: a left arm in a mirror is a right one.

    pairs: an id is in one of them at most.
    """
    swapped = ids
    for one, other in pairs:
        swapped = torch.where(ids == one, other, torch.where(ids == other, one, swapped))
    return swapped


def augment(
    image: Tensor,
    mask: Tensor | None,
    config: AugmentConfig,
    seed: int,
    crop_by_mask: bool = True,
    saliency: Tensor | None = None,
    pseudo_mask: Tensor | None = None,
) -> Augmented:
    """image uint8 [3, H, W], mask int32 [H, W] -> one training crop, a pure function of the rest.

    crop_by_mask: whether `category_max_ratio` may look at the mask. saliency: uint8 [H, W] and
    pseudo_mask: int [H, W], cut as the mask is; nothing is drawn for them and no crop is chosen by
    them, so it is the same with and without.
    """
    draw = random.Random(seed)  # its stream is the same in every version of Python
    crop = crop_height, crop_width = config.crop_size
    height, width = image.shape[1:]
    low, high = config.scale_range
    scale = low + (high - low) * draw.random()
    new_height, new_width = resized_size(
        height, width, config.resize, scale, keep_ratio=config.keep_ratio
    )
    rows, columns = nearest_indices(height, new_height), nearest_indices(width, new_width)
    looked_at = mask if crop_by_mask and config.category_max_ratio < 1 else None
    top, left = _crop_box(rows, columns, looked_at, config, draw)
    image = resize_image(image, (new_height, new_width))
    num_rows, num_columns = min(crop_height, new_height - top), min(crop_width, new_width - left)
    flipped = draw.random() < config.flip
    crop_box = CropBox(
        left / new_width,
        top / new_height,
        num_columns / new_width,
        num_rows / new_height,
        flipped,
        num_rows,
        num_columns,
    )
    angle = None
    if config.rotate and draw.random() < config.rotate_chance:
        angle = math.radians(config.rotate * (2 * draw.random() - 1))
    image, inside, row, column = _cut(image, rows, columns, (top, left), crop, crop_box, angle)
    if config.photometric:
        image = distort_colours(image, draw)

    place = (row * width + column).numpy()

    def padded(pixels: Tensor, fill: int) -> Tensor:
        return _padded(pixels.masked_fill(~inside, fill), crop, fill)

    def cut(pixels: Tensor) -> Tensor:
        return torch.from_numpy(pixels.numpy().take(place))  # many times faster than indexing

    return Augmented(
        image=padded(image, 0),
        valid=_padded(inside, crop, False),
        mask=None if mask is None else padded(cut(mask), IGNORE),
        crop_box=crop_box,
        saliency=None if saliency is None else padded(cut(saliency).float() / 255, -1),
        pseudo_mask=None if pseudo_mask is None else padded(cut(pseudo_mask), IGNORE),
    )


def _cut(
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    corner: tuple[int, int],
    crop: tuple[int, int],
    box: CropBox,
    angle: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The crop's pixels, and where they come from.

    image: uint8 [3, h, w], resized; rows [h], columns [w]: its pixels in the stored image; angle:
    in radians, None for a straight crop. Returns uint8 [3, y, x], bool [y, x] (False outside of the
    image), and row and column in the stored image, which broadcast to [y, x].
    """
    top, left = corner
    if angle is not None:
        height, width = len(rows), len(columns)
        y, x = _turned(top + box.rows / 2, left + box.columns / 2, crop, angle, box)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        row = rows[y.long().clamp_(0, height - 1)]
        column = columns[x.long().clamp_(0, width - 1)]
        return _sampled(image, y, x), inside, row, column
    bottom, right = top + box.rows, left + box.columns
    image, column = image[:, top:bottom, left:right], columns[left:right]
    if box.flipped:
        image, column = image.flip(-1), column.flip(0)
    inside = torch.ones(box.rows, box.columns, dtype=torch.bool)
    return image, inside, rows[top:bottom, None], column


def _turned(
    centre_y: float, centre_x: float, crop: tuple[int, int], angle: float, box: CropBox
) -> tuple[Tensor, Tensor]:
    """Where each pixel of a turned crop looks: y, x [Y, X] in pixels of the resized image.

    centre: of the straight crop's valid part, about which it is turned by `angle` radians.
    """
    row, column = (torch.arange(side, dtype=torch.float64) + 0.5 for side in crop)
    down, across = (row - box.rows / 2)[:, None], (column - box.columns / 2)[None]
    cosine, sine = math.cos(angle), math.sin(angle)
    y, x = cosine * down - sine * across, sine * down + cosine * across
    return centre_y + y, centre_x + (-x if box.flipped else x)


def _sampled(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """uint8 [3, H, W] at the points y, x [Y, X], bilinear: uint8 [3, Y, X]. Pixel (i, j) has its
    centre at (i + 0.5, j + 0.5); the image goes on beyond its border as it ends there.
    """
    height, width = image.shape[1:]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1).float()
    pixels = F.grid_sample(
        image[None].float(), grid[None], padding_mode="border", align_corners=False
    )
    return pixels[0].round().to(torch.uint8)


def _crop_box(
    rows: Tensor, columns: Tensor, mask: Tensor | None, config: AugmentConfig, draw: random.Random
) -> tuple[int, int]:
    """The crop's top left corner in the resized image."""
    height, width = config.crop_size
    spare_height, spare_width = max(len(rows) - height, 0), max(len(columns) - width, 0)

    def corner() -> tuple[int, int]:
        return int(draw.random() * (spare_height + 1)), int(draw.random() * (spare_width + 1))

    top, left = corner()
    if mask is None or spare_height == spare_width == 0:
        return top, left
    pixels, rows_at, columns_at = mask.numpy(), rows.numpy(), columns.numpy()
    for _ in range(_CROP_TRIES):
        seen = pixels.take(rows_at[top : top + height : 2], axis=0)
        seen = seen.take(columns_at[left : left + width : 2], axis=1)
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
            return _through_table(image, levels * uniform(*_GAIN))
        return image

    levels = torch.arange(256, dtype=torch.float32)
    if draw.random() < 0.5:
        shift = round(uniform(-_BRIGHTNESS, _BRIGHTNESS))
        image = _through_table(image, levels + shift)
    contrast_first = draw.random() < 0.5
    if contrast_first:
        image = contrast(image)
    gain = uniform(*_GAIN) if draw.random() < 0.5 else 1.0
    turn = uniform(-_HUE, _HUE) if draw.random() < 0.5 else 0.0
    if gain != 1 or turn != 0:
        image = _shift_colours(image, gain, turn)
    return image if contrast_first else contrast(image)


def _through_table(image: Tensor, table: Tensor) -> Tensor:
    """uint8 [3, H, W], each value v replaced by table[v], float32 [256], cut to 0..255."""
    values = table.clamp(0, 255).to(torch.uint8).numpy()
    return torch.from_numpy(cv2.LUT(image.permute(1, 2, 0).numpy(), values)).permute(2, 0, 1)


def _shift_colours(image: Tensor, gain: float, turn: float) -> Tensor:
    """uint8 [3, H, W] with saturation times `gain` and hue turned by `turn` of the circle."""
    levels = np.arange(256)
    moved = np.empty((1, 256, 3), np.uint8)
    moved[0, :, 0] = (levels + round(turn * 256)) % 256  # wraps around, as the circle does
    moved[0, :, 1] = np.clip(np.rint(levels * gain), 0, 255)
    moved[0, :, 2] = levels
    hsv = cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2HSV_FULL)
    pixels = cv2.cvtColor(cv2.LUT(hsv, moved), cv2.COLOR_HSV2RGB_FULL)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _padded(pixels: Tensor, crop: tuple[int, int], fill: int | bool) -> Tensor:
    """[..., h, w] -> [..., Y, X] with `fill` at the right and bottom."""
    height, width = pixels.shape[-2:]
    padded = pixels.new_full((*pixels.shape[:-2], *crop), fill)
    padded[..., :height, :width] = pixels
    return padded
