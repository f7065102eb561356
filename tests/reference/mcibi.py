"""MCIBI's equations as nested loops over pixels and classes, as the paper has them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.methods.mcibi.statistics import EPS


def enlarged(map_Chw: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W]."""
    return F.interpolate(map_Chw[None], size, mode="bilinear", align_corners=False)[0]


def class_weights_and_pixels(
    maps: list[Tensor],
    targets: list[Tensor],
    memory: dict[int, Tensor],
    class_id: int,
    weighting: str = "cosine",
) -> list[tuple[Tensor, Tensor]]:
    """Eq. 8 - 10 before the division: (weight, r_p) of each pixel of the class, of all images."""
    found = []
    for map_Chw, target_HW in zip(maps, targets):
        pixels = enlarged(map_Chw, (target_HW.shape[0], target_HW.shape[1]))
        for y in range(target_HW.shape[0]):
            for x in range(target_HW.shape[1]):
                if target_HW[y, x] != class_id:
                    continue
                r = pixels[:, y, x]
                weight = torch.ones_like(r[0])
                if weighting == "cosine" and class_id in memory:
                    m = memory[class_id]
                    weight = 1 - (r @ m) / (r.norm() * m.norm()) + EPS
                found.append((weight, r))
    return found


def transform(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """T of one class, Eq. 10."""
    total = sum(weight for weight, _ in pairs)
    return sum(weight / total * r for weight, r in pairs)


def momentum_at(
    step: int, num_steps: int, start: float = 0.9, power: float = 0.9, floor: float = 0.01
) -> float:
    """Eq. 7, where the floor is 1 / 100."""
    return (1 - step / num_steps) ** power * (start - start * floor) + start * floor


def updated(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """Eq. 6."""
    return (1 - momentum) * old + momentum * new


def gathered(logits_Khw: Tensor, memory: dict[int, Tensor], dim: int) -> Tensor:
    """C'_bi of Eq. 12, [C, h, w]; classes without a vector add nothing."""
    num_classes, height, width = logits_Khw.shape
    columns = []
    for y in range(height):
        for x in range(width):
            scores = [logits_Khw[k, y, x].exp() for k in range(num_classes)]
            total = sum(scores)
            value = torch.zeros(dim, dtype=logits_Khw.dtype)
            for k, m in memory.items():
                value = value + scores[k] / total * m
            columns.append(value)
    return torch.stack(columns, dim=1).unflatten(1, (height, width))


def attended(query_dhw: Tensor, key_dhw: Tensor, value_dhw: Tensor) -> Tensor:
    """P g_v(C'_bi) of Eq. 13 and 14, [d, h, w]: every position looks at every position."""
    query, key, value = (map.flatten(1) for map in (query_dhw, key_dhw, value_dhw))
    scale = math.sqrt(len(query))
    columns = []
    for i in range(query.shape[1]):
        scores = [(query[:, i] @ key[:, j] / scale).exp() for j in range(key.shape[1])]
        total = sum(scores)
        columns.append(sum(s / total * value[:, j] for j, s in enumerate(scores)))
    return torch.stack(columns, dim=1).unflatten(1, tuple(query_dhw.shape[1:]))


def pixel_loss(logits_BKhw: Tensor, target_BHW: Tensor, divide_by: str = "valid") -> Tensor:
    """Eq. 16 and 18."""
    total, count = torch.zeros((), dtype=logits_BKhw.dtype), 0
    for logits_Khw, target_HW in zip(logits_BKhw, target_BHW):
        large = enlarged(logits_Khw, (target_HW.shape[0], target_HW.shape[1]))
        for y in range(target_HW.shape[0]):
            for x in range(target_HW.shape[1]):
                if divide_by == "all" or target_HW[y, x] != IGNORE:
                    count += 1
                if target_HW[y, x] != IGNORE:
                    total = total - large[:, y, x].log_softmax(dim=0)[target_HW[y, x]]
    return total / max(count, 1)


def consistency_loss(logits: dict[int, Tensor]) -> Tensor:
    """Eq. 17, over the classes that have a vector; logits: H2's of each vector, [K]."""
    losses = [-row.log_softmax(dim=0)[class_id] for class_id, row in logits.items()]
    return sum(losses) / len(losses)
