"""Explicit pseudo-pixel supervision (EPS, Lee et al. 2021): maps should add up to saliency.

Softmax over L classes and a background gives each position's shares p. What the present classes
cover should be what a saliency model finds, but for classes that the saliency model passes over:

    agrees_l = |p_l > 1/2 and S > 1/2| / |p_l > 1/2| > tau              (pixels; 0 / 0 = 0)
    fg = sum of p_l over present l that agree
    bg = p_background + sum of p_l over present l that do not
    loss = mean over pixels with known S of (lambda fg + (1 - lambda) (1 - bg) - S)^2

Absent classes are on neither side, so lambda weighs whether fg lacks or bg exceeds.

Shape letters: B images, L classes, h x w positions, H x W pixels of the saliency map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memseg_dist.nn.resize import fill_up, upsample


def saliency_loss(
    logits_BMhw: Tensor,
    labels_BL: Tensor,
    saliency_BHW: Tensor | None,
    *,
    stride: int,
    tau: float = 0.4,
    foreground_weight: float = 0.5,
) -> Tensor:
    """The loss above, [], at the size of the saliency map.

    logits: M = L + 1 channels, the background last, of `stride` pixels per position. labels: bool,
    the classes present. saliency: 0..1, negative where unknown. foreground_weight: lambda (EPS: 0.5
    on VOC, 0.9 on COCO).

    Slow definition: for every image b and pixel q with S_bq >= 0, p = softmax(logits_b) enlarged to
    q; add (lambda fg_q + (1 - lambda)(1 - bg_q) - S_bq)^2; divide by the number of such pixels.
    ValueError if there is not one channel more than there are labels, or without saliency maps.
    """
    if saliency_BHW is None:
        raise ValueError(
            "saliency loss: the batch has no saliency maps; set the `saliency` folder of its source"
        )
    num_channels, num_classes = logits_BMhw.shape[1], labels_BL.shape[1]
    if num_channels != num_classes + 1:
        raise ValueError(
            f"saliency loss: logits have {num_channels} channels for {num_classes} classes; give "
            f"{num_classes + 1}, the background last"
        )
    saliency_BHW = fill_up(saliency_BHW, stride, -1)
    share_BMhw = logits_BMhw.softmax(dim=1)
    agrees_BL = _agrees(share_BMhw[:, :-1].detach(), saliency_BHW, tau)
    side_BL = agrees_BL.to(share_BMhw.dtype) - (1 - foreground_weight)  # lambda, or lambda - 1
    # enlarging is linear: add up at the low resolution, enlarge one map
    estimate_Bhw = torch.einsum("blhw,bl->bhw", share_BMhw[:, :-1], side_BL * labels_BL)
    estimate_Bhw = estimate_Bhw + (1 - foreground_weight) * (1 - share_BMhw[:, -1])
    estimate_BHW = upsample(estimate_Bhw, saliency_BHW.shape[1:])
    known_BHW = saliency_BHW >= 0
    error_BHW = (estimate_BHW - saliency_BHW).square() * known_BHW
    return error_BHW.sum() / known_BHW.sum().clamp_min(1)


@torch.no_grad()
def _agrees(share_BLhw: Tensor, saliency_BHW: Tensor, tau: float) -> Tensor:
    """bool [B, L]; image by image, for only one image's maps are of full size at a time."""
    rows = []
    for share_Lhw, saliency_HW in zip(share_BLhw, saliency_BHW):
        is_class_LHW = (upsample(share_Lhw, saliency_HW.shape) > 0.5) & (saliency_HW >= 0)
        overlap_L = (is_class_LHW & (saliency_HW > 0.5)).sum(dim=(1, 2))
        rows.append(overlap_L > tau * is_class_LHW.sum(dim=(1, 2)))
    return torch.stack(rows)
