"""A and B: RandAugment (Cubuk et al. 2020), then CutOut (DeVries & Taylor 2017), of a whole slot.

    operators = draw_operators(config, random, valid)
    images = operators.images(images, valid, fill)                              # A
    maps = operators.maps(maps)                                                 # B
    cut = operators.cut_out()                                                   # A's boxes

What is drawn is a function of the seed alone, and no operation waits for the device. An image's
geometric operations become one affine map, so that A reads each of its pixels once (bilinear) and B
once (nearest); its colour operations follow, in the order they were drawn.

Coordinates are those of PIL: the centre of pixel (y, x) is at (x + 0.5, y + 0.5); a matrix says
where a pixel of the result is read. Shearing leaves the first row or column where it is, a rotation
the centre of the image.

Shape letters: B images, H x W pixels, M maps, N boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from memseg_dist.batch import onto_device

if TYPE_CHECKING:
    from memseg_dist.methods.three_stage.config import ThreeStageConfig

Matrix: TypeAlias = np.ndarray
"""[3, 3] float64: homogeneous coordinates (x, y, 1) of the result -> of the image."""
MAGNITUDES = (1, 9)


def rotation(magnitude: int, sign: int, height: int, width: int) -> Matrix:
    angle = math.radians(sign * 3 * magnitude)
    cosine, sine = math.cos(angle), math.sin(angle)
    turn = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    to_centre = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    return to_centre @ turn @ np.linalg.inv(to_centre)


def shear_x(magnitude: int, sign: int, height: int, width: int) -> Matrix:
    return np.array([[1, sign * 0.03 * magnitude, 0], [0, 1, 0], [0, 0, 1]])


def shear_y(magnitude: int, sign: int, height: int, width: int) -> Matrix:
    return np.array([[1, 0, 0], [sign * 0.03 * magnitude, 1, 0], [0, 0, 1]])


def translation_x(magnitude: int, sign: int, height: int, width: int) -> Matrix:
    return np.array([[1, 0, sign * magnitude], [0, 1, 0], [0, 0, 1]])


def translation_y(magnitude: int, sign: int, height: int, width: int) -> Matrix:
    return np.array([[1, 0, 0], [0, 1, sign * magnitude], [0, 0, 1]])


def autocontrast(image: Tensor) -> Tensor:
    """torchvision's indexes by a mask, for which the host waits."""
    low, high = image.amin((-2, -1), keepdim=True), image.amax((-2, -1), keepdim=True)
    scale = 255 / (high - low).clamp_min(1)
    return torch.where(high > low, ((image - low) * scale).to(torch.uint8), image)


def adjust_sharpness(image: Tensor, factor: float) -> Tensor:
    """torchvision's copies its kernel, [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, from the host."""
    if min(image.shape[-2:]) < 3:
        return image
    pixels = image.float()
    inside = pixels[:, 1:-1, 1:-1]
    blurred = ((9 * F.avg_pool2d(pixels, 3, 1) + 4 * inside) / 13).round()
    sharpened = pixels.clone()
    sharpened[:, 1:-1, 1:-1] = blurred + factor * (inside - blurred)
    return sharpened.clamp(0, 255).to(torch.uint8)


GEOMETRIC: dict[str, Callable[[int, int, int, int], Matrix]] = {
    "rotate": rotation,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translation_x,
    "translate_y": translation_y,
}
"""(magnitude, sign, height, width) -> matrix."""


def factor(magnitude: int) -> float:
    return 0.18 * magnitude + 0.1


COLOUR: dict[str, Callable[[Tensor, int], Tensor]] = {
    "autocontrast": lambda image, m: autocontrast(image),
    "equalize": lambda image, m: colour.equalize_image(image),
    "solarize": lambda image, m: colour.solarize_image(image, 256 - int(25.6 * m)),
    "posterize": lambda image, m: colour.posterize_image(image, 4 - int(0.4 * m)),
    "color": lambda image, m: colour.adjust_saturation_image(image, factor(m)),
    "contrast": lambda image, m: colour.adjust_contrast_image(image, factor(m)),
    "brightness": lambda image, m: colour.adjust_brightness_image(image, factor(m)),
    "sharpness": lambda image, m: adjust_sharpness(image, factor(m)),
}
"""(uint8 [3, H, W], magnitude) -> the same."""

OPERATIONS = ("identity", *GEOMETRIC, *COLOUR)


@dataclass(frozen=True)
class Drawn:
    """Of one image. colours: names and magnitudes. boxes: int64 [N, 4], each (top, bottom, left,
    right), possibly beyond the image.
    """

    matrix: Matrix
    colours: tuple[tuple[str, int], ...]
    boxes: np.ndarray


def draw(config: ThreeStageConfig, random: Random, height: int, width: int) -> Drawn:
    """As many numbers are drawn whatever comes of them."""
    matrix, colours = np.eye(3), []
    for _ in range(config.randaugment_ops):
        name, magnitude = random.choice(OPERATIONS), random.randint(*MAGNITUDES)
        is_applied = random.random() < config.randaugment_chance
        sign = random.choice((-1, 1))
        if is_applied and name in GEOMETRIC:
            matrix = matrix @ GEOMETRIC[name](magnitude, sign, height, width)
        elif is_applied and name in COLOUR:
            colours.append((name, magnitude))
    side = round(config.cutout_share * min(height, width))
    boxes = np.zeros((config.cutout_boxes, 4), np.int64)
    for box in boxes:
        top, left = random.randrange(height) - side // 2, random.randrange(width) - side // 2
        box[:] = top, top + side, left, left + side
    return Drawn(matrix, tuple(colours), boxes)


def draw_operators(config: ThreeStageConfig, random: Random, valid_BHW: Tensor) -> Operators:
    """Of each image its own, on the device of `valid`."""
    count, *size = valid_BHW.shape
    return Operators([draw(config, random, *size) for _ in range(count)], size, valid_BHW.device)


class Operators:
    """A and B of the images of a slot, on the device."""

    def __init__(
        self, drawn: Sequence[Drawn], size: Sequence[int], device: torch.device | str
    ) -> None:
        self._colours = [one.colours for one in drawn]
        matrices = np.stack([one.matrix[:2] for one in drawn]).astype(np.float32)
        boxes = np.stack([one.boxes for one in drawn])
        matrix_B23, self._boxes_BN4 = onto_device(device, matrices, boxes)
        self._size = size
        self._grid_BHW2 = self._sampled(matrix_B23)

    def images(self, images_B3HW: Tensor, valid_BHW: Tensor, fill_311: Tensor) -> Tensor:
        """uint8 -> uint8; the colour `fill` comes in from outside and stands for padding."""
        inside = (images_B3HW - fill_311) * valid_BHW[:, None]
        warped = self._warp(inside, "bilinear") + fill_311
        images = warped.round().clamp(0, 255).to(torch.uint8)
        return torch.stack([_coloured(*pair) for pair in zip(images, self._colours)])

    def maps(self, maps_BMHW: Tensor) -> Tensor:
        """float -> float; 0 comes in from outside."""
        return self._warp(maps_BMHW, "nearest")

    def cut_out(self) -> Tensor:
        """bool [B, H, W]: the pixels under CutOut's boxes."""
        y_H1, x_W = self._axes()
        top, bottom, left, right = self._boxes_BN4[..., None, None].unbind(2)  # [B, N, 1, 1]
        return ((y_H1 >= top) & (y_H1 < bottom) & (x_W >= left) & (x_W < right)).any(dim=1)

    def _warp(self, maps_BMHW: Tensor, mode: str) -> Tensor:
        grid_BHW2 = self._grid_BHW2.to(maps_BMHW.dtype)
        return F.grid_sample(maps_BMHW, grid_BHW2, mode, "zeros", align_corners=False)

    def _axes(self) -> tuple[Tensor, Tensor]:
        device = self._boxes_BN4.device
        height, width = self._size
        return torch.arange(height, device=device)[:, None], torch.arange(width, device=device)

    def _sampled(self, matrix_B23: Tensor) -> Tensor:
        """Where each pixel is read, as `grid_sample` wants it. No matrix product makes it: on a GPU
        that would round coordinates to TF32.
        """
        height, width = self._size
        y_H1, x_W = (axis + 0.5 for axis in self._axes())
        (a, b, c), (d, e, f) = (
            row_B3[..., None, None].unbind(1) for row_B3 in matrix_B23.unbind(1)
        )
        across_BHW, down_BHW = a * x_W + b * y_H1 + c, d * x_W + e * y_H1 + f
        return torch.stack([2 * across_BHW / width - 1, 2 * down_BHW / height - 1], dim=-1)


def _coloured(image: Tensor, operations: tuple[tuple[str, int], ...]) -> Tensor:
    for name, magnitude in operations:
        image = COLOUR[name](image, magnitude)
    return image
