"""Calibrated fusion of two sources of pseudo labels (Eq. 4), and the loss on them (Eq. 2).

    r = sqrt(mean(p^2, m^2));  q = sharpen(gamma softmax(p / r) + (1 - gamma) softmax(m / r))
    L_u = -1/|valid| sum over valid positions of sum_k q_k log softmax_k(strong view)

Shape letters: B images, h x w positions, T classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NormScope = Literal["batch", "image", "per_source"]
_EPS = 1e-8


def root_mean_square(
    decoder_BThw: Tensor, activation_BThw: Tensor, valid_Bhw: Tensor, scope: NormScope
) -> tuple[Tensor, Tensor]:
    """r of the two sources, to divide by: over all the logits of both at valid positions.

    "batch": one number, for both. "image": one for each image, [B, 1, 1, 1]. "per_source": each
    source has its own.
    """
    axes = (1, 2, 3) if scope == "image" else (0, 1, 2, 3)
    num_classes = decoder_BThw.shape[1]
    counted = valid_Bhw[:, None].float()
    count = num_classes * counted.sum(dim=axes, keepdim=True).clamp_min(1)
    squares = [
        (logits.square() * counted).sum(dim=axes, keepdim=True) / count
        for logits in (decoder_BThw, activation_BThw)
    ]
    if scope != "per_source":
        squares = [(squares[0] + squares[1]) / 2] * 2
    return (squares[0] + _EPS).sqrt(), (squares[1] + _EPS).sqrt()


def fuse(
    decoder_BThw: Tensor,
    activation_BThw: Tensor,
    valid_Bhw: Tensor,
    gamma: float = 0.5,
    scope: NormScope = "batch",
    centred: bool = True,
) -> Tensor:
    """Eq. 4 before it is sharpened: probabilities [B, T, h, w] of two maps of logits.

    gamma: weight of the decoder's. centred: without the logits' mean over the classes, which says
    nothing about them but counts in r.
    """
    if centred:
        decoder_BThw = decoder_BThw - decoder_BThw.mean(dim=1, keepdim=True)
        activation_BThw = activation_BThw - activation_BThw.mean(dim=1, keepdim=True)
    decoder_rms, activation_rms = root_mean_square(decoder_BThw, activation_BThw, valid_Bhw, scope)
    decoder = (decoder_BThw / decoder_rms).softmax(dim=1)
    return torch.lerp((activation_BThw / activation_rms).softmax(dim=1), decoder, gamma)


def sharpen(probabilities_BThw: Tensor, temperature: float) -> Tensor:
    """p^(1/T) over its sum; T below 1 makes the likely classes likelier."""
    logs = probabilities_BThw.clamp_min(torch.finfo(probabilities_BThw.dtype).tiny).log()
    return (logs / temperature).softmax(dim=1)


def soft_cross_entropy(
    logits_BThw: Tensor, target_BThw: Tensor, counted_Bhw: Tensor, divided_by_Bhw: Tensor
) -> Tensor:
    """Cross-entropy with probabilities as targets, summed over the `counted` positions, over the
    number of the positions `divided_by` (the same, but for a threshold of confidence).
    """
    loss_Bhw = -(target_BThw * F.log_softmax(logits_BThw, dim=1)).sum(dim=1)
    return (loss_Bhw * counted_Bhw).sum() / divided_by_Bhw.sum().clamp_min(1)
