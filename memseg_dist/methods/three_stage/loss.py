"""Pixel losses over enlarged logits: mean over the pixels that have a target, 0 if none has.

Shape letters: B images, H x W pixels, h x w positions, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.nn.pixel_loss import pixel_cross_entropy
from memseg_dist.nn.resize import fill_up, padded_size, upsample


def hard_loss(logits_BKhw: Tensor, target_BHW: Tensor, stride: int) -> Tensor:
    """Cross-entropy; targets are columns 0..K-1 or IGNORE. stride: of the logits."""
    filled = fill_up(target_BHW, stride, IGNORE)
    return pixel_cross_entropy(logits_BKhw, None, filled, denominator="valid")


def soft_loss(logits_BKhw: Tensor, target_BKHW: Tensor, counts_BHW: Tensor, stride: int) -> Tensor:
    """-sum_k p_k log q_k for probabilities p; all of [B, K, H, W] is kept for backward."""
    height, width = target_BKHW.shape[2:]
    logits = upsample(logits_BKhw, padded_size((height, width), stride))
    log_q_BKHW = logits[..., :height, :width].log_softmax(dim=1)
    loss_BHW = -(target_BKHW * log_q_BKHW).sum(dim=1)
    return torch.where(counts_BHW, loss_BHW, 0.0).sum() / counts_BHW.sum().clamp_min(1)


def to_target(map_B1HW: Tensor, counts_BHW: Tensor) -> Tensor:
    """A map of 1 + column as a target: IGNORE where it is 0, or where the pixel does not count."""
    return torch.where(counts_BHW, map_B1HW[:, 0].long() - 1, IGNORE)
