"""Attention of every position of a map over every position of another, [N x N] never kept.

    out = g_o( softmax( g_q(x) g_k(y)^T / sqrt(d) ) g_v(y) )

The product runs in the fused kernels of `scaled_dot_product_attention`.

Shape letters: B images, N query and M key positions, d channels of the products.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


class MapAttention(nn.Module):
    """g_q and g_k are `num_layers` 1 x 1 convolutions each, g_v and g_o one; all with BatchNorm and
    ReLU. dim: of both maps and the result; inner_dim: d.
    """

    def __init__(self, dim: int, inner_dim: int, num_layers: int = 2) -> None:
        super().__init__()
        self.query = _layers(dim, inner_dim, num_layers)
        self.key = _layers(dim, inner_dim, num_layers)
        self.value = Conv2dNormActivation(dim, inner_dim, 1)
        self.out = Conv2dNormActivation(inner_dim, dim, 1)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries: [B, dim, h, w]; keys: [B, dim, ...], of any size. Gives the queries' shape."""
        size = queries.shape[-2:]
        query_BNd, key_BMd, value_BMd = (
            map.flatten(2).mT.contiguous()
            for map in (self.query(queries), self.key(keys), self.value(keys))
        )
        # the fused kernels want an axis of heads and channels side by side, or keep [N x N]
        mixed_BNd = F.scaled_dot_product_attention(
            query_BNd[:, None], key_BMd[:, None], value_BMd[:, None]
        )[:, 0]
        return self.out(mixed_BNd.mT.unflatten(2, size))


def _layers(dim: int, inner_dim: int, num_layers: int) -> nn.Sequential:
    dims = [dim, *[inner_dim] * num_layers]
    return nn.Sequential(*(Conv2dNormActivation(*pair, 1) for pair in pairwise(dims)))
