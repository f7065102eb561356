"""LarvSeg as the paper and its code have it, computed the long way: the yardstick of the tests.

Dense logits at the loss resolution, a memory of every single pixel, loops over images and labels.
Nothing here is used in training.

Shape letters: N classes of the source, h x w positions, H x W pixels of the loss, D channels,
M events, K pixels of an event.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class PixelMemory:
    """Per class the last M events, each of up to K unit pixel features, all of them stored."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.events: dict[int, list[Tensor]] = {}

    def enqueue(self, class_id: int, event_KD: Tensor) -> None:
        ring = self.events.setdefault(class_id, [])
        ring.append(event_KD)
        del ring[: -self.capacity]

    def count(self, class_id: int) -> int:
        return len(self.events.get(class_id, []))

    def score(self, class_id: int, x_LD: Tensor) -> Tensor:
        """Eq. 3: mean over events, and over the pixels of each, of the cosine to every position
        [L].
        """
        ring = self.events[class_id]
        return torch.stack([(x_LD @ event_KD.T).mean(dim=1) for event_KD in ring]).mean(dim=0)


def normalised_logits(x_LD: Tensor, weight_ND: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Raw cosines and logits z [L, N]: LayerNorm of the cosines over the classes."""
    cosine_LN = x_LD @ weight_ND.T
    mean_L1 = cosine_LN.mean(dim=1, keepdim=True)
    variance_L1 = cosine_LN.var(dim=1, keepdim=True, correction=0)
    return cosine_LN, gamma * (cosine_LN - mean_L1) / torch.sqrt(variance_L1 + 1e-5)


def seg_loss(
    x_BLD: Tensor,
    weight_ND: Tensor,
    gamma: Tensor,
    target_BHW: Tensor,
    low_size: tuple[int, int],
) -> Tensor:
    """L_seg with all pixels, ignored (-1) ones included, in the denominator."""
    size = tuple(target_BHW.shape[1:])
    total = x_BLD.new_zeros(())
    for x_LD, target_HW in zip(x_BLD, target_BHW):
        z_NHW = _enlarged(normalised_logits(x_LD, weight_ND, gamma)[1], low_size, size)
        total = total + F.cross_entropy(
            z_NHW[None], target_HW[None], ignore_index=-1, reduction="sum"
        )
    return total / target_BHW.numel()


def weak_losses(
    x_BLD: Tensor,
    weight_ND: Tensor,
    gamma: Tensor,
    labels: list[list[int]],
    valid_BHW: Tensor,
    valid_BL: Tensor,
    low_size: tuple[int, int],
    memory: PixelMemory,
    *,
    warm_up: int,
    peak_threshold: float,
    distance_threshold: float,
) -> tuple[Tensor, Tensor]:
    """L_cls and L_aux (unweighted) with single- and multi-label backgrounds; columns are class
    ids.
    """
    size = tuple(valid_BHW.shape[1:])
    cls_losses, aux_losses = [], []
    for x_LD, image_labels, valid_HW, valid_L in zip(x_BLD, labels, valid_BHW, valid_BL):
        cosine_LN, z_LN = normalised_logits(x_LD, weight_ND, gamma)
        z_NHW = _enlarged(z_LN, low_size, size)
        for label in image_labels:
            others = [other for other in image_labels if other != label]
            pooled_N = z_NHW[:, valid_HW].mean(dim=1)
            cls_losses.append(_loss_without(pooled_N, label, others))
            if memory.count(label) < warm_up:
                aux_losses.append(pooled_N.sum() * 0)
                continue
            with torch.no_grad():
                foreground_L = memory.score(label, x_LD)
                if others:
                    background = [
                        memory.score(k, x_LD) for k in others if memory.count(k) >= warm_up
                    ]
                else:
                    background = _mined(
                        memory, label, x_LD, cosine_LN, valid_L, foreground_L,
                        warm_up, peak_threshold, distance_threshold,
                    )  # fmt: skip
                background_L = (
                    torch.stack(background).mean(dim=0) if background else 1 - foreground_L
                )
                contrast_L = foreground_L - background_L
                mean = contrast_L[valid_L].mean()
                variance = contrast_L[valid_L].var(correction=0)
                normed_L1 = ((contrast_L - mean) / torch.sqrt(variance + 1e-5))[:, None]
                attention_HW = torch.sigmoid(_enlarged(normed_L1, low_size, size)[0])
            attended_N = (z_NHW * attention_HW)[:, valid_HW].mean(dim=1)
            aux_losses.append(_loss_without(attended_N, label, others))
    return torch.stack(cls_losses).mean(), torch.stack(aux_losses).mean()


def high_score_loss(
    x_BLD: Tensor,
    weight_ND: Tensor,
    gamma: Tensor,
    labels: list[list[int]],
    valid_BHW: Tensor,
    low_size: tuple[int, int],
) -> Tensor:
    """L_aux (unweighted) of Table 5's single-image design: the mean logits of the pixels whose
    cosine to the label exceeds the mean of the image's pixels by their standard deviation.
    """
    size, losses = tuple(valid_BHW.shape[1:]), []
    for x_LD, image_labels, valid_HW in zip(x_BLD, labels, valid_BHW):
        cosine_LN, z_LN = normalised_logits(x_LD, weight_ND, gamma)
        z_NHW = _enlarged(z_LN, low_size, size)
        for label in image_labels:
            score_HW = _enlarged(cosine_LN[:, [label]], low_size, size)[0]
            known = score_HW[valid_HW]
            chosen_HW = valid_HW & (score_HW > known.mean() + known.std(correction=0))
            others = [other for other in image_labels if other != label]
            losses.append(_loss_without(z_NHW[:, chosen_HW].mean(dim=1), label, others))
    return torch.stack(losses).mean()


def top_pixels(x_LD: Tensor, cosine_L: Tensor, valid_L: Tensor, top_k: int) -> Tensor:
    """The features [<= K, D] of the valid positions with the highest cosine to the class."""
    order = cosine_L[valid_L].argsort(descending=True)[:top_k]
    return x_LD[valid_L][order]


def _mined(
    memory,
    label,
    x_LD,
    cosine_LN,
    valid_L,
    foreground_L,
    warm_up,
    peak_threshold,
    distance_threshold,
) -> list[Tensor]:
    kept = []
    foreground = foreground_L[valid_L]
    foreground = (foreground - foreground.mean()) / foreground.std()
    for k in range(cosine_LN.shape[1]):
        peak = cosine_LN[valid_L, k].sort(descending=True).values[:5].mean()
        if k == label or peak <= peak_threshold or memory.count(k) < warm_up:
            continue
        score_L = memory.score(k, x_LD)
        score = (score_L[valid_L] - score_L[valid_L].mean()) / score_L[valid_L].std()
        if (foreground - score).square().mean() > distance_threshold:
            kept.append(score_L)
    return kept


def _loss_without(logits_N: Tensor, label: int, others: list[int]) -> Tensor:
    """Cross-entropy with the columns of the image's other labels removed."""
    kept = [k for k in range(len(logits_N)) if k not in others]
    target = torch.tensor([kept.index(label)], device=logits_N.device)
    return F.cross_entropy(logits_N[kept][None], target)


def _enlarged(map_LN: Tensor, low_size: tuple[int, int], size) -> Tensor:
    """[L, N] -> [N, H, W]."""
    low_Nhw = map_LN.T.unflatten(1, low_size)
    return F.interpolate(low_Nhw[None], size, mode="bilinear", align_corners=False)[0]
