"""LarvSeg's classifier: two projections and a learned class table, all of one width; its logits.

LarvSeg's logit is the raw cosine c_pk = x_p . w_k, normalised over the classes of the pixel:

    z_pk = gamma * (c_pk - mean_k c_p) / sqrt(var_k c_p + eps)            (LayerNorm over classes)

A softmax does not see a shift that is constant over k: z_pk = (gamma / sigma_p) x_p . w_k, with

    sigma_p^2 = var_k (x_p . w_k) + eps = x_pᵀ S x_p + eps,   S = covariance of the w_k   [D, D].

Hence every logit of the method is *linear* in the scaled feature u_p = gamma x_p / sigma_p, and no
[pixels, classes] matrix is needed.

Shape letters: B images, h x w positions, L = h * w, D channels, N classes of the current
vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5


class CosineClassifier(nn.Module):
    """x = normalise(F P), w = normalise(E Q); the logit is a function of x . w.

    The paper's "one-layer cosine classifier" as the official code has it: P and Q [D, D] drawn from
    N(0, 1/D), E [num_classes, D] from a truncated normal of 0.02, and a scale gamma that starts at
    1.
    """

    def __init__(self, num_classes: int, in_dim: int, dim: int | None = None) -> None:
        super().__init__()
        dim = dim or in_dim
        self.num_classes, self.dim = num_classes, dim
        self.feature_projection = nn.Parameter(torch.randn(in_dim, dim) * in_dim**-0.5)
        self.class_projection = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.class_table = nn.Parameter(torch.empty(num_classes, dim))
        self.gamma = nn.Parameter(torch.ones(()))
        nn.init.trunc_normal_(self.class_table, std=0.02)

    def embed(self, features_BDhw: Tensor) -> Tensor:
        """Unit pixel embeddings [B, L, D]."""
        return F.normalize(features_BDhw.flatten(2).mT @ self.feature_projection, dim=-1)

    def class_weights(self, class_ids_N: Tensor) -> Tensor:
        """Unit class vectors [N, D]."""
        return F.normalize(self.class_table[class_ids_N] @ self.class_projection, dim=-1)


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
