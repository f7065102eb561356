"""LarvSeg's classifier: two projections and a learned class table, all of one width.

Shape letters: B images, h x w positions, L = h * w, D channels, N classes of the current
vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
