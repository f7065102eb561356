"""LarvSeg's losses over linear logits u . w: of pixels (L_seg), of images (L_cls, L_aux).

Image-level cross-entropy over spatially pooled logits, one row per (image, label):

    loss_r = -log softmax_k( sum_p a_rp u_p . w_k )[target_r]

with the other labels of the image taken out of the softmax.

The official code enlarges all logits, weighs and averages them. Enlarging is linear, so its adjoint
moves the weights to the low resolution instead (`pooling_weights`), and pooling the D-vector u
before the classifier leaves one [pairs, classes] product. Identities (a)-(c) of the specification.

Shape letters: R (image, label) pairs, B images, L = h * w positions, H x W pixels of the loss, D
channels, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.nn.pixel_loss import Denominator, pixel_cross_entropy
from memseg_dist.nn.resize import upsample_adjoint

LOSS_STRIDE = 2
"""Losses are taken on every second pixel of the crop, as in the official code."""


class SlotFeatures(NamedTuple):
    """What the losses of one slot share; x are unit features, u the scaled ones."""

    batch: Batch
    clock: Clock
    low_size: tuple[int, int]
    x_BLD: Tensor
    u_BLD: Tensor
    weight_ND: Tensor


def segmentation_loss(
    u_BDhw: Tensor,
    weight_ND: Tensor,
    target_BHW: Tensor,
    *,
    multiplicity_N: Tensor | None,
    denominator: Denominator,
) -> Tensor:
    """L_seg: cross-entropy of the enlarged logits; targets are columns 0..N-1 or IGNORE.

    multiplicity: class k has so many equal columns in the softmax; a pixel's target is one of them.
    """
    if multiplicity_N is None:
        return pixel_cross_entropy(u_BDhw, weight_ND, target_BHW, denominator=denominator)
    bias_N = multiplicity_N.to(u_BDhw.dtype).log()
    loss = pixel_cross_entropy(
        u_BDhw, weight_ND, target_BHW, bias_N=bias_N, denominator=denominator
    )
    # k equal columns: their class has k times the probability, its target one of the k
    is_known_BHW = target_BHW != IGNORE
    constant = (bias_N[target_BHW.clamp_min(0)] * is_known_BHW).sum()
    return loss + constant / (
        target_BHW.numel() if denominator == "all" else is_known_BHW.sum().clamp_min(1)
    )


def pooling_weights(
    attention_RHW: Tensor, valid_RHW: Tensor, low_size: Sequence[int], *, by_attention: bool
) -> Tensor:
    """a [R, L] with sum_p a_p z_p = sum_q up(z)_q A_q V_q / sum_q V_q.

    by_attention divides by sum_q A_q V_q instead, so that the weights of a pair sum to one.
    """
    weighted_RHW = attention_RHW * valid_RHW
    mass_R = (weighted_RHW if by_attention else valid_RHW.to(weighted_RHW.dtype)).sum(dim=(1, 2))
    low_Rhw = upsample_adjoint(weighted_RHW, low_size, weighted_RHW.shape[1])
    return low_Rhw.flatten(1) / mass_R.clamp_min(torch.finfo(mass_R.dtype).tiny)[:, None]


def pooled_logits(
    features_BLD: Tensor, weights_RL: Tensor, image_R: Tensor, weight_ND: Tensor
) -> Tensor:
    """[R, N] logits of pair r: the features of image image_R[r], pooled with weights_RL[r]."""
    one_hot_RB = F.one_hot(image_R, features_BLD.shape[0]).to(features_BLD.dtype)
    per_image_BRL = one_hot_RB.T[:, :, None] * weights_RL
    pooled_RD = torch.einsum("brl,bld->rd", per_image_BRL, features_BLD)
    return pooled_RD @ weight_ND.T


def image_cross_entropy(
    logits_RN: Tensor, target_R: Tensor, others: tuple[Tensor, Tensor], temperature: float = 1.0
) -> Tensor:
    """Per-pair loss [R]; `others` = (pair, column) indices that leave the softmax of that pair."""
    logits_RN = logits_RN / temperature
    logits_RN = logits_RN.index_put(others, logits_RN.new_full((), float("-inf")))
    return F.cross_entropy(logits_RN, target_R, reduction="none")
