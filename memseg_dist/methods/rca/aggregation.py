"""Reading prototypes into a feature map (RCA's semantic aggregation).

Shape letters: B images, D channels, h x w positions, P prototypes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionScale = Literal["sqrt_dim", "raw", "cosine"]


class PrototypeAttention(nn.Module):
    """Eq. 7, 8: S = softmax(scale F Q^T), F' = S Q. No weights; Q takes no gradient.

    scale "raw": 1 (the paper), a softmax that picks one prototype or two; "sqrt_dim": 1 / sqrt(D),
    of many; "cosine": of unit vectors, over `temperature`. Fused: no [positions, P] map is kept.
    """

    def __init__(self, scale: AttentionScale = "sqrt_dim", temperature: float = 0.07) -> None:
        super().__init__()
        self.scale, self.temperature = scale, temperature

    def forward(self, features_BDhw: Tensor, prototypes_PD: Tensor) -> Tensor:
        """[B, D, h, w]; zeros while there are no prototypes."""
        if len(prototypes_PD) == 0:
            return torch.zeros_like(features_BDhw)
        query, key, scale = self._operands(features_BDhw, prototypes_PD)
        keys = key.expand(len(query), 1, -1, -1)
        values = prototypes_PD.expand(len(query), 1, -1, -1)
        read = F.scaled_dot_product_attention(query[:, None], keys, values, scale=scale)
        return read[:, 0].mT.reshape(features_BDhw.shape)

    def affinity(self, features_BDhw: Tensor, prototypes_PD: Tensor) -> Tensor:
        """S itself, [B, P, h, w]: for pictures, not for training."""
        query, key, scale = self._operands(features_BDhw, prototypes_PD)
        affinity = (scale * query @ key.T).softmax(dim=-1)
        return affinity.mT.unflatten(2, features_BDhw.shape[-2:])

    def _operands(self, features_BDhw: Tensor, prototypes_PD: Tensor):
        # fused kernels take rows that lie together; otherwise the whole map would be kept
        query = features_BDhw.flatten(2).mT.contiguous()
        if self.scale == "cosine":
            unit = F.normalize(query, dim=-1), F.normalize(prototypes_PD, dim=-1)
            return *unit, 1 / self.temperature
        return query, prototypes_PD, 1.0 if self.scale == "raw" else query.shape[-1] ** -0.5


class LinearAggregation(nn.Module):
    """Aggregation of RCA's code: A = 2 q k^T without softmax, then two 1 x 1 convolutions.

    [B, D, h, w] -> [B, D, h, w], of [F, F'] at once. For fixed prototypes it is a linear map of F:
    q (k^T v) costs no [positions, P] map either.
    """

    FACTOR = 2.0
    """The code divides by 10 and multiplies by 20."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(dim, dim, 1)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Conv2d(dim, dim, 1)
        self.concat = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, features_BDhw: Tensor, prototypes_PD: Tensor) -> Tensor:
        mixing_DD = self.key(prototypes_PD).T @ self.value(prototypes_PD)
        read = torch.einsum("bdhw,de->behw", self.query(features_BDhw), self.FACTOR * mixing_DD)
        return self.concat(torch.cat([features_BDhw, self.output(read)], dim=1))
