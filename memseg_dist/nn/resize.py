"""Bilinear resizing as two matrix products, and its exact adjoint.

`F.interpolate(mode="bilinear", align_corners=False)` is linear and separable: up(z) = V z Hᵀ with
two small constant matrices. Written so, any strip of rows can be made alone, the adjoint is a
transpose, and both are deterministic on a GPU (the library's backward uses atomic adds).

Shape letters: h x w low resolution, H x W high resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=64)
def interpolation_matrix(
    size: int, low_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[size, low_size] matrix that resizes a column of low_size values to size values."""
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(low_size, dtype=torch.float64)[None, None]
        matrix = F.interpolate(identity, (size, low_size), mode="bilinear", align_corners=False)
        return matrix[0, 0].to(device=device, dtype=dtype, non_blocking=True)


def upsample(low: Tensor, size: Sequence[int], rows: slice = slice(None)) -> Tensor:
    """[..., h, w] -> rows `rows` of the [..., H, W] bilinear (align_corners=False) enlargement."""
    vertical = interpolation_matrix(size[0], low.shape[-2], low.dtype, low.device)[rows]
    horizontal = interpolation_matrix(size[1], low.shape[-1], low.dtype, low.device)
    return vertical @ low @ horizontal.T


def upsample_positions(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[k, h, w] -> [k, n, m], where h x w positions come from an image of n x m pixels."""
    whole = padded_size(maps, size)
    enlarged = F.interpolate(maps[None], size=whole, mode="bilinear", align_corners=False)[0]
    return enlarged[:, : size[0], : size[1]]


def fill_up(pixels: Tensor, stride: int, value: int | bool) -> Tensor:
    """[B, H, W] filled up below and to the right to whole positions of `stride` pixels, which is
    what a backbone's maps cover.
    """
    below, right = (-side % stride for side in pixels.shape[1:])
    return F.pad(pixels, (0, right, 0, below), value=value) if below or right else pixels


def within_image(map: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """The positions of a map [..., h, w] that lie on an image of `size` pixels. stride: that of the
    backbone's deepest map; a finer one goes on beyond the image by less than one position of it.
    """
    sizes = zip(map.shape[-2:], size, strict=True)
    rows, columns = (-(-n // max(1, -(-n // stride) * stride // h)) for h, n in sizes)
    return map[..., :rows, :columns]


def at_positions(pixels_BHW: Tensor, map: Tensor) -> Tensor:
    """bool [B, H, W] at the centres of a map's h x w positions, False where they lie outside."""
    height, width = map.shape[-2:]
    down, across = -(-pixels_BHW.shape[1] // height), -(-pixels_BHW.shape[2] // width)
    right, below = width * across - pixels_BHW.shape[2], height * down - pixels_BHW.shape[1]
    filled = F.pad(pixels_BHW, (0, right, 0, below))
    return filled[:, down // 2 :: down, across // 2 :: across]


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


def upsample_adjoint(
    high: Tensor, low_size: Sequence[int], height: int, rows: slice = slice(None)
) -> Tensor:
    """The transpose of `upsample`: [..., len(rows), W] -> [..., h, w], for a full height of H."""
    vertical = interpolation_matrix(height, low_size[0], high.dtype, high.device)[rows]
    horizontal = interpolation_matrix(high.shape[-1], low_size[1], high.dtype, high.device)
    return vertical.T @ high @ horizontal
