"""Bilinear resizing as two matrix products, and its exact adjoint.

`F.interpolate(mode="bilinear", align_corners=False)` is linear and separable: up(z) = V z Hᵀ with
two small constant matrices. Written so, any strip of rows can be made alone, the adjoint is a
transpose, and both are deterministic on a GPU (the library's backward uses atomic adds).

Shape letters: B images, h x w low resolution (N positions), H x W high resolution.
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


def upsample_positions(maps: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """[k, h, w] -> [k, n, m]: h x w positions of `stride` pixels, from an image of n x m."""
    whole = padded_size(size, stride)
    enlarged = F.interpolate(maps[None], size=whole, mode="bilinear", align_corners=False)[0]
    return enlarged[:, : size[0], : size[1]]


def fill_up(pixels: Tensor, stride: int, value: int | bool) -> Tensor:
    """[B, H, W] filled up below and to the right to whole positions of `stride` pixels, which is
    what a backbone's maps cover.
    """
    below, right = (-side % stride for side in pixels.shape[1:])
    return F.pad(pixels, (0, right, 0, below), value=value) if below or right else pixels


def valid_positions(valid_BHW: Tensor, stride: int) -> Tensor:
    """bool [B, N]: positions of the feature map at least half of whose pixels are image.

    Neither padding of the crop nor what a backbone adds to fill the last stride is.
    """
    filled = fill_up(valid_BHW, stride, False).float()
    return F.avg_pool2d(filled, stride).flatten(1) >= 0.5


def within_image(map: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """The positions of a map [..., h, w] that lie on an image of `size` pixels. stride: the map's
    own; a map finer than the backbone's deepest goes on beyond the image.
    """
    rows, columns = (-(-length // stride) for length in size)
    return map[..., :rows, :columns]


def at_positions(pixels_BHW: Tensor, map: Tensor, stride: int) -> Tensor:
    """bool [B, H, W] at the centres of a map's h x w positions of `stride` pixels, False where they
    lie outside.
    """
    below, right = (h * stride - n for h, n in zip(map.shape[-2:], pixels_BHW.shape[1:]))
    filled = F.pad(pixels_BHW, (0, right, 0, below))
    return filled[:, stride // 2 :: stride, stride // 2 :: stride]


def padded_size(size: Sequence[int], stride: int) -> tuple[int, int]:
    """The pixels that the positions of an n x m image span: n x m plus the net's padding, which
    fills up whole strides.
    """
    height, width = size
    return height + -height % stride, width + -width % stride


def upsample_adjoint(
    high: Tensor, low_size: Sequence[int], height: int, rows: slice = slice(None)
) -> Tensor:
    """The transpose of `upsample`: [..., len(rows), W] -> [..., h, w], for a full height of H."""
    vertical = interpolation_matrix(height, low_size[0], high.dtype, high.device)[rows]
    horizontal = interpolation_matrix(high.shape[-1], low_size[1], high.dtype, high.device)
    return vertical.T @ high @ horizontal
