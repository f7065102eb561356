"""Three-stage's operators, losses and teacher as nested loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE


def read_at(matrix: np.ndarray, y: int, x: int) -> tuple[float, float]:
    """Row and column, in pixels whose centres are whole numbers, that a pixel of A's is read at."""
    across, down, _ = matrix @ np.array([x + 0.5, y + 0.5, 1.0])
    return down - 0.5, across - 0.5


def warped_nearest(map_HW: Tensor, matrix: np.ndarray, outside: float) -> Tensor:
    """B of a map."""
    height, width = map_HW.shape
    result = torch.full_like(map_HW, outside)
    for y in range(height):
        for x in range(width):
            row, column = (math.floor(at + 0.5) for at in read_at(matrix, y, x))
            if 0 <= row < height and 0 <= column < width:
                result[y, x] = map_HW[row, column]
    return result


def warped_bilinear(image_CHW: Tensor, matrix: np.ndarray, outside_C: Tensor) -> Tensor:
    """A's geometric part."""
    _, height, width = image_CHW.shape
    result = torch.zeros(image_CHW.shape, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            row, column = read_at(matrix, y, x)
            for i in (math.floor(row), math.floor(row) + 1):
                for j in (math.floor(column), math.floor(column) + 1):
                    share = (1 - abs(row - i)) * (1 - abs(column - j))
                    is_inside = 0 <= i < height and 0 <= j < width
                    result[:, y, x] += share * (image_CHW[:, i, j] if is_inside else outside_C)
    return result


def is_tie(matrix: np.ndarray, size: tuple[int, int]) -> Tensor:
    """bool [H, W]: pixels that are read half-way between two others, up to rounding."""
    ties = [
        [any(abs(at % 1 - 0.5) < 1e-4 for at in read_at(matrix, y, x)) for x in range(size[1])]
        for y in range(size[0])
    ]
    return torch.tensor(ties)


def enlarged(logits_Khw: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Logits of whole positions of `stride` pixels, cut to the picture."""
    whole = [positions * stride for positions in logits_Khw.shape[1:]]
    logits = F.interpolate(logits_Khw[None], whole, mode="bilinear", align_corners=False)[0]
    return logits[:, : size[0], : size[1]]


def mean_cross_entropy(logits: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Over the pixels of some images, [K, H, W] and [H, W] or probabilities [K, H, W], that have a
    target; 0 without any. A probability is IGNORE for all classes where it is none.
    """
    total, count = logits[0].sum() * 0, 0
    for logits_KHW, target in zip(logits, targets, strict=True):
        for y in range(target.shape[-2]):
            for x in range(target.shape[-1]):
                here, log_q = target[..., y, x], logits_KHW[:, y, x].log_softmax(dim=0)
                if target.ndim == 2 and here != IGNORE:
                    total, count = total - log_q[here], count + 1
                elif target.ndim == 3 and here[0] != IGNORE:
                    total, count = total - (here * log_q).sum(), count + 1
    return total / max(count, 1)


def moved(teacher: dict[str, Tensor], student: dict[str, Tensor], decay: float) -> None:
    """One step of the moving average, number by number."""
    for name, tensor in teacher.items():
        old, new = tensor.flatten().tolist(), student[name].flatten().tolist()
        mixed = [decay * a + (1 - decay) * b for a, b in zip(old, new, strict=True)]
        teacher[name] = torch.tensor(mixed, dtype=tensor.dtype).view_as(tensor)
