"""LarvSeg's category-wise attention map (section 3.3): constants, never differentiated.

Shape letters: R (image, label) pairs, B images, L positions, D channels, N classes of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import onto_device
from memseg_dist.methods.pairs import LabelPairs
from memseg_dist.nn.resize import upsample

EPSILON = 1e-5
NUM_PEAKS = 5
CHUNK_ELEMENTS = 1 << 23

BackgroundReduction = Literal["mean", "max"]


@dataclass(frozen=True)
class OtherLabels:
    """For each pair the other labels of its image.

    is_other bool [R, R]: s is another label of r's image. columns: the same as (pair, column)
    indices. single: the pairs whose image has no other label.
    """

    is_other: Tensor
    columns: tuple[Tensor, Tensor]
    single: Tensor

    @staticmethod
    def of(pairs: LabelPairs, device: torch.device) -> OtherLabels:
        image_R = pairs.image_ids
        is_other_RR = (image_R[:, None] == image_R) & ~np.eye(len(pairs), dtype=bool)
        pair, other = np.nonzero(is_other_RR)
        single = np.flatnonzero(pairs.num_labels == 1)
        is_other, *columns, single_on_device = onto_device(
            device, is_other_RR, pair, pairs.columns[other], single
        )
        return OtherLabels(is_other, (columns[0], columns[1]), single_on_device)


def pair_scores(x_BLD: Tensor, vector_RD: Tensor, image_R: Tensor) -> Tensor:
    """[R, L]: products of pair r's vector with the positions of its image."""
    every_image_BRL = torch.einsum("bld,rd->brl", x_BLD, vector_RD)
    return every_image_BRL[image_R, torch.arange(len(image_R), device=x_BLD.device)]


def top_pixel_mean(
    score_RL: Tensor, valid_RL: Tensor, features_BLD: Tensor, image_R: Tensor, top_k: int
) -> Tensor:
    """Mean feature [R, D] of the (at most) top_k valid positions with the highest score.

    One memory event. Not re-normalised: the mean over events of these means is then exactly the
    mean over all the M * top_k vectors that the paper stores.
    """
    num_positions = score_RL.shape[1]
    masked_RL = score_RL.masked_fill(~valid_RL, float("-inf"))
    best_RK = masked_RL.topk(min(top_k, num_positions), dim=1).indices
    counted_RK = valid_RL.gather(1, best_RK).to(features_BLD.dtype)
    chosen_RKD = features_BLD.flatten(0, 1)[image_R[:, None] * num_positions + best_RK]
    mean_RD = torch.einsum("rk,rkd->rd", counted_RK, chosen_RKD)
    return mean_RD / counted_RK.sum(dim=1).clamp_min(1)[:, None]


def background_of_other_labels(
    score_RL: Tensor, is_background_RR: Tensor, reduction: BackgroundReduction = "mean"
) -> tuple[Tensor, Tensor]:
    """S_bg of images with several labels: reduce the scores of the image's other labels.

    is_background_RR[r, s]: pair s is a warm label of r's image other than r's. Returns [R, L] and
    how many labels were reduced [R] (0: the row is meaningless).
    """
    count_R = is_background_RR.sum(dim=1)
    if reduction == "max":
        spread_RRL = score_RL[None].expand(score_RL.shape[0], -1, -1)
        spread_RRL = spread_RRL.masked_fill(~is_background_RR[:, :, None], float("-inf"))
        best_RL = spread_RRL.amax(dim=1) if score_RL.shape[0] else score_RL
        return best_RL.masked_fill(count_R[:, None] == 0, 0.0), count_R
    mean_RL = is_background_RR.to(score_RL.dtype) @ score_RL / count_R.clamp_min(1)[:, None]
    return mean_RL, count_R


def mined_background(
    features_BLD: Tensor,
    valid_BL: Tensor,
    score_BL: Tensor,
    label_B: Tensor,
    weight_ND: Tensor,
    means_ND: Tensor,
    warm_N: Tensor,
    *,
    peak_threshold: float,
    distance_threshold: float,
    reduction: BackgroundReduction = "mean",
) -> tuple[Tensor, Tensor]:
    """S_bg of images with one label: classes seen in the image that look unlike the label.

    A class k is background if the mean of its 5 highest cosines exceeds peak_threshold, its memory
    is warm, and its score map is unlike the label's: mse(zscore(s_fg), zscore(s_k)) >
    distance_threshold, which is 2 (1 - correlation) (L - 1) / L. label_B holds columns of
    weight_ND. Returns [B, L] and the number of classes [B].
    """
    num_images, num_positions, _ = features_BLD.shape
    if num_images == 0:
        return score_BL, torch.zeros_like(label_B)
    valid_BL1 = valid_BL[:, :, None]
    num_valid_B = valid_BL.sum(dim=1).to(score_BL.dtype)
    unit_score_BL = _centred_unit(score_BL[:, :, None], valid_BL1)[:, :, 0]
    result_BL = torch.zeros_like(score_BL)
    if reduction == "max":
        result_BL = result_BL - torch.inf
    count_B = torch.zeros_like(label_B)
    chunk = max(1, CHUNK_ELEMENTS // (num_images * num_positions))
    for start in range(0, weight_ND.shape[0], chunk):
        columns = slice(start, min(start + chunk, weight_ND.shape[0]))
        cosine_BLn = features_BLD @ weight_ND[columns].T
        cosine_BLn = cosine_BLn.masked_fill(~valid_BL1, float("-inf"))
        peak_Bn = cosine_BLn.topk(min(NUM_PEAKS, num_positions), dim=1).values.mean(dim=1)
        score_BLn = features_BLD @ means_ND[columns].T
        unit_BLn = _centred_unit(score_BLn, valid_BL1)
        correlation_Bn = torch.einsum("bl,bln->bn", unit_score_BL, unit_BLn)
        distance_Bn = 2 * (1 - correlation_Bn) * ((num_valid_B - 1) / num_valid_B)[:, None]
        column_n = torch.arange(columns.start, columns.stop, device=label_B.device)
        kept_Bn = (peak_Bn > peak_threshold) & (distance_Bn > distance_threshold)
        kept_Bn &= warm_N[columns] & (column_n != label_B[:, None])
        count_B += kept_Bn.sum(dim=1)
        if reduction == "max":
            masked_BLn = score_BLn.masked_fill(~kept_Bn[:, None], float("-inf"))
            result_BL = torch.maximum(result_BL, masked_BLn.amax(dim=2))
        else:
            result_BL += torch.einsum("bln,bn->bl", score_BLn, kept_Bn.to(score_BLn.dtype))
    if reduction == "max":
        return result_BL.masked_fill(count_B[:, None] == 0, 0.0), count_B
    return result_BL / count_B.clamp_min(1)[:, None], count_B


def contrast(foreground_RL: Tensor, background_RL: Tensor, count_R: Tensor) -> Tensor:
    """S_fg - S_bg [R, L]; without any background class, S_bg = 1 - S_fg (the official code)."""
    return foreground_RL - torch.where(count_R[:, None] > 0, background_RL, 1 - foreground_RL)


def attention_map(
    contrast_RL: Tensor, valid_RL: Tensor, low_size: Sequence[int], size: Sequence[int]
) -> Tensor:
    """Eq. 4: A = sigmoid(up(norm(S_fg - S_bg))) [R, H, W]; norm = z-score over valid positions."""
    weight_RL = valid_RL.to(contrast_RL.dtype)
    count_R1 = weight_RL.sum(dim=1, keepdim=True).clamp_min(1)
    centred_RL = contrast_RL - (contrast_RL * weight_RL).sum(dim=1, keepdim=True) / count_R1
    variance_R1 = (centred_RL.square() * weight_RL).sum(dim=1, keepdim=True) / count_R1
    normed_RL = centred_RL * torch.rsqrt(variance_R1 + EPSILON)
    return torch.sigmoid(upsample(normed_RL.unflatten(1, tuple(low_size)), size))


def high_scores(score_RL: Tensor, valid_RHW: Tensor, low_size: Sequence[int]) -> Tensor:
    """Table 5's regions [R, H, W]: 1 where the enlarged score exceeds its mean by its standard
    deviation, both over the pixels that are image; else 0.
    """
    score_RHW = upsample(score_RL.unflatten(1, tuple(low_size)), valid_RHW.shape[1:])
    share_RHW = valid_RHW / valid_RHW.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    centred_RHW = score_RHW - (score_RHW * share_RHW).sum(dim=(1, 2), keepdim=True)
    variance_R11 = (centred_RHW.square() * share_RHW).sum(dim=(1, 2), keepdim=True)
    return (centred_RHW > variance_R11.sqrt()).to(score_RHW.dtype)


def _centred_unit(map_BLn: Tensor, valid_BL1: Tensor) -> Tensor:
    """Centred over valid positions, of unit length; NaN (never background) if constant."""
    weight_BL1 = valid_BL1.to(map_BLn.dtype)
    mean_B1n = (map_BLn * weight_BL1).sum(1, keepdim=True) / weight_BL1.sum(1, keepdim=True)
    centred_BLn = (map_BLn - mean_B1n) * weight_BL1
    return F.normalize(centred_BLn, dim=1, eps=0.0)
