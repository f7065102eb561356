"""Pixel cross-entropy over upsampled logits, with nothing of [pixels, classes] kept.

    loss = -1/|pixels| sum_q log softmax_k( up(u)_q . w_k + b_k )[target_q]

Because upsampling is linear, up(u . w) = up(u) . w; without weights w, u are the logits. The
forward pass walks over images and strips of rows; for each it makes the logits, adds to the loss,
and folds their gradient back to the low resolution at once. What is kept for backward has the shape
of u and of w.

Shape letters: B images, h x w low resolution, H x W target resolution, D channels, N classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.nn.resize import upsample, upsample_adjoint

Denominator = Literal["all", "valid"]
STRIP_ELEMENTS = 1 << 24
"""Logits made at a time (64 MiB in fp32)."""


def pixel_cross_entropy(
    features_BDhw: Tensor,
    weight_ND: Tensor | None,
    target_BHW: Tensor,
    *,
    bias_N: Tensor | None = None,
    denominator: Denominator = "all",
    strip_elements: int = STRIP_ELEMENTS,
) -> Tensor:
    """Mean cross-entropy; targets are columns 0..N-1 or IGNORE.

    weight None: the features are the logits themselves, [B, N, h, w] (of a head that is more than
    one linear layer). strip_elements: logits made at a time.
    denominator "all" divides by every pixel, ignored or not (the official code); "valid" by those
    that have a target.
    """
    if denominator == "all":
        # filled on the device: torch.tensor(..., device=) would wait for it
        count = torch.full((), float(target_BHW.numel()), device=features_BDhw.device)
    else:
        count = (target_BHW != IGNORE).sum().clamp_min(1)
    total = _PixelCrossEntropy.apply(features_BDhw, weight_ND, bias_N, target_BHW, strip_elements)
    return total / count.to(total.dtype)


class _PixelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features_BDhw, weight_ND, bias_N, target_BHW, strip_elements):
        wants_gradient = any(ctx.needs_input_grad)
        features_gradient = torch.zeros_like(features_BDhw)
        weight_gradient = torch.zeros_like(features_BDhw[:0] if weight_ND is None else weight_ND)
        one_N = features_BDhw[0, :, 0, 0] if weight_ND is None else weight_ND[:, 0]
        bias_gradient = torch.zeros_like(one_N)
        total = features_BDhw.new_zeros(())
        height, width = target_BHW.shape[1:]
        step = max(1, strip_elements // (len(one_N) * width))
        for index, target_HW in enumerate(target_BHW):
            features_Dhw = features_BDhw[index]
            low_Nhw = features_Dhw
            if weight_ND is not None:
                low_Nhw = torch.einsum("nd,dhw->nhw", weight_ND, features_Dhw)
            low_gradient_Nhw = torch.zeros_like(low_Nhw)
            for top in range(0, height, step):
                rows = slice(top, min(top + step, height))
                logits_NsW = upsample(low_Nhw, (height, width), rows)
                if bias_N is not None:
                    logits_NsW = logits_NsW + bias_N[:, None, None]
                loss, gradient_NsW = _strip(logits_NsW, target_HW[rows], wants_gradient)
                total += loss
                if wants_gradient:
                    low_gradient_Nhw += upsample_adjoint(
                        gradient_NsW, low_Nhw.shape[1:], height, rows
                    )
            if wants_gradient:
                bias_gradient += low_gradient_Nhw.sum(dim=(1, 2))  # upsampling keeps a constant
                if weight_ND is not None:
                    weight_gradient += torch.einsum("nhw,dhw->nd", low_gradient_Nhw, features_Dhw)
                    low_gradient_Nhw = torch.einsum("nhw,nd->dhw", low_gradient_Nhw, weight_ND)
                features_gradient[index] = low_gradient_Nhw
        ctx.save_for_backward(features_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        parts = zip(ctx.saved_tensors, ctx.needs_input_grad)  # of features, weight and bias
        return *(gradient * part if needed else None for part, needed in parts), None, None


def _strip(logits_NsW: Tensor, target_sW: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """Summed loss of one strip and its gradient with respect to the logits."""
    known_sW = target_sW != IGNORE
    column_1sW = target_sW.clamp_min(0)[None]
    log_p_NsW = F.log_softmax(logits_NsW, dim=0)
    loss = -(log_p_NsW.gather(0, column_1sW)[0] * known_sW).sum()
    if not wants_gradient:
        return loss, log_p_NsW
    gradient_NsW = log_p_NsW.exp_()
    gradient_NsW.scatter_add_(0, column_1sW, -torch.ones_like(gradient_NsW[:1]))
    return loss, gradient_NsW.mul_(known_sW)
