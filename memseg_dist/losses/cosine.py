"""The class-normalised cosine logit, and how to have it without a [pixels, classes] matrix.

LarvSeg's logit is the raw cosine c_pk = x_p . w_k, normalised over the classes of the pixel:

    z_pk = gamma * (c_pk - mean_k c_p) / sqrt(var_k c_p + eps)            (LayerNorm over classes)

A softmax does not see a shift that is constant over k: z_pk = (gamma / sigma_p) x_p . w_k, with

    sigma_p^2 = var_k (x_p . w_k) + eps = x_pᵀ S x_p + eps,   S = covariance of the w_k   [D, D].

Hence every logit of the method is *linear* in the scaled feature u_p = gamma x_p / sigma_p.

Shape letters: N classes, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-5


def class_covariance(weight_ND: Tensor, multiplicity_N: Tensor | None = None) -> Tensor:
    """Biased covariance [D, D] of the class vectors; class k counts multiplicity_N[k] times.

    Centred before the product: E[w wᵀ] - E[w] E[w]ᵀ cancels badly in fp32.
    """
    if multiplicity_N is None:
        centred_ND = weight_ND - weight_ND.mean(dim=0)
        return centred_ND.T @ centred_ND / weight_ND.shape[0]
    share_N1 = multiplicity_N.to(weight_ND.dtype)[:, None] / multiplicity_N.sum()
    centred_ND = weight_ND - (share_N1 * weight_ND).sum(dim=0)
    return centred_ND.T @ (share_N1 * centred_ND)


def class_normalised(
    x: Tensor, weight_ND: Tensor, gamma: Tensor, multiplicity_N: Tensor | None = None
) -> Tensor:
    """u = gamma x / sigma for unit features x [..., D]: softmax(u @ weightᵀ) = softmax(z)."""
    covariance_DD = class_covariance(weight_ND, multiplicity_N)
    variance = ((x @ covariance_DD) * x).sum(dim=-1, keepdim=True)
    return gamma * x * torch.rsqrt(variance.clamp_min(0) + EPSILON)
