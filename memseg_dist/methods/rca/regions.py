"""Regions of activation maps: their pooled features, and the losses of pooled scores.

Shape letters: B images, L classes, D channels, N = h w positions, R (image, label) pairs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import Batch, onto_device

RegionMask = Literal["mean", "softmax"]


def label_targets(batch: Batch, column_C: np.ndarray, scores_BL: Tensor) -> Tensor:
    """y: 1 where the image has the label, of the type and shape of `scores`, [B, L]."""
    target_BL = np.zeros(scores_BL.shape, dtype=np.float32)
    for image, labels in enumerate(batch.labels):
        target_BL[image, column_C[list(labels)]] = 1
    (target,) = onto_device(scores_BL.device, target_BL)
    return target.to(scores_BL.dtype)


def masked_mean(maps_BCN: Tensor, valid_BN: Tensor) -> Tensor:
    """Global average pooling over the positions that are not padding: [B, C]; 0 without any."""
    weight_BN = valid_BN.to(maps_BCN.dtype)
    count_B1 = weight_BN.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bcn,bn->bc", maps_BCN, weight_BN / count_B1)


@torch.no_grad()
def region_masks(
    maps_BLN: Tensor,
    valid_BN: Tensor,
    image_R: Tensor,
    column_R: Tensor,
    rule: RegionMask = "mean",
) -> Tensor:
    """M of Eq. 2: bool [R, N], where the map of the pair's class exceeds its own mean.

    rule "softmax": the map is first a softmax over the classes, as in the code. A map that nowhere
    exceeds its mean (a constant one) gives the whole image.
    """
    if rule == "softmax":
        maps_BLN = maps_BLN.softmax(dim=1)
    map_RN, valid_RN = maps_BLN[image_R, column_R], valid_BN[image_R]
    count_R1 = valid_RN.sum(dim=1, keepdim=True).clamp_min(1)
    mean_R1 = (map_RN * valid_RN).sum(dim=1, keepdim=True) / count_R1
    mask_RN = (map_RN > mean_R1) & valid_RN
    return torch.where(mask_RN.any(dim=1, keepdim=True), mask_RN, valid_RN)


def region_means(features_BDN: Tensor, mask_RN: Tensor, image_R: Tensor) -> Tensor:
    """Eq. 2: the mean feature of every region, each by its own mask: [R, D].

    Slow definition: for each r, features[image_r][:, mask_r].mean(dim=1).
    """
    weight_RN = mask_RN.to(features_BDN.dtype)
    weight_RN = weight_RN / weight_RN.sum(dim=1, keepdim=True).clamp_min(1)
    of_image_RB = F.one_hot(image_R, len(features_BDN)).to(features_BDN.dtype)
    # a region weighs nothing in other images: one product, no copy of features per region
    return torch.einsum("rb,rn,bdn->rd", of_image_RB, weight_RN, features_BDN)


def multi_label_loss(scores_BL: Tensor, target_BL: Tensor, counts_B: Tensor) -> Tensor:
    """Multi-label soft margin: mean over classes of the binary cross-entropy, mean over images.

    counts bool [B]: images that count; the others (blanked ones) add 0 to the mean over B.
    """
    loss_BL = F.binary_cross_entropy_with_logits(scores_BL, target_BL, reduction="none")
    return (loss_BL.mean(dim=1) * counts_B).sum() / len(scores_BL)
