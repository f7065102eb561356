"""PseudoSeg's equations as loops over images, positions and classes, as the paper has them."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def grad_cam(features_Dhw: Tensor, logits_F: Sequence[Tensor], shown: Sequence[bool]) -> Tensor:
    """Grad-CAM by automatic differentiation: [F, h, w], each class over its maximum."""
    maps = []
    for logit, is_shown in zip(logits_F, shown, strict=True):
        (gradient,) = torch.autograd.grad(logit, features_Dhw, retain_graph=True)
        weights_D = gradient.mean(dim=(1, 2))
        cam = sum(weight * channel for weight, channel in zip(weights_D, features_Dhw)).relu()
        peak = cam.max()
        maps.append(cam / peak if is_shown and peak > 0 else torch.zeros_like(cam))
    return torch.stack(maps).detach()


def attended(query_dN: Tensor, key_dN: Tensor, value_FN: Tensor, valid_N: Tensor) -> Tensor:
    """Eq. 3 with its skip, position by position: [F, N]."""
    columns = []
    for i in range(query_dN.shape[1]):
        scores = [
            query_dN[:, i] @ key_dN[:, j] / math.sqrt(len(query_dN))
            for j in range(key_dN.shape[1])
            if valid_N[j]
        ]
        weights = torch.stack(scores).softmax(dim=0)
        values = [value_FN[:, j] for j in range(key_dN.shape[1]) if valid_N[j]]
        columns.append(sum(w * v for w, v in zip(weights, values)) + value_FN[:, i])
    return torch.stack(columns, dim=1)


def calibrated(
    p: Tensor, m: Tensor, valid: Tensor, gamma: float, temperature: float, centred: bool
) -> Tensor:
    """Eq. 4 of maps [B, T, h, w], position by position, with the mean under the root."""
    if centred:
        p, m = ((sum(-map[:, k] for k in range(map.shape[1])) / map.shape[1])[:, None] + map
                for map in (p, m))  # fmt: skip
    squares = []
    for b, y, x in valid.nonzero().tolist():
        squares += [*p[b, :, y, x].square(), *m[b, :, y, x].square()]
    r = (sum(squares) / len(squares) + 1e-8).sqrt()
    found = torch.zeros_like(p)
    for b in range(len(p)):
        for y in range(p.shape[2]):
            for x in range(p.shape[3]):
                first, second = (p[b, :, y, x] / r).softmax(0), (m[b, :, y, x] / r).softmax(0)
                q = gamma * first + (1 - gamma) * second
                found[b, :, y, x] = q ** (1 / temperature) / (q ** (1 / temperature)).sum()
    return found


def soft_loss(logits: Tensor, target: Tensor, counted: Tensor, divided_by: Tensor) -> Tensor:
    """Eq. 2."""
    total = logits.new_zeros(())
    for b, y, x in counted.nonzero().tolist():
        log_p = logits[b, :, y, x].log_softmax(0)
        total = total - sum(q * s for q, s in zip(target[b, :, y, x], log_p))
    return total / int(divided_by.sum())


def saturated(image: Tensor, factor: float) -> Tensor:
    """[3, H, W] with HSV's saturation scaled, pixel by pixel."""
    found = torch.zeros_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            found[:, y, x] = torch.tensor(colorsys.hsv_to_rgb(h, min(1.0, s * factor), v))
    return found
