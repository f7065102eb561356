"""OCRNet's object-contextual representations (Yuan et al. 2020).

    x_n = conv3x3(map)_n                                            pixel representations
    o_k = sum_n softmax_n(region_kn) x_n                            object region representations
    y_n = g_o( sum_k softmax_k(g_q(x_n) . g_k(o_k) / sqrt(d)) g_v(o_k) )
    out = conv3x3([y, x])

Shape letters: B images, N = h w positions, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from memseg_dist.nn.attention import MapAttention
from memseg_dist.nn.resize import upsample


class ObjectContext(nn.Module):
    """Its regions are the logits of an auxiliary head on an earlier stage."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.pixels = Conv2dNormActivation(in_dim, dim, 3)
        self.attention = MapAttention(dim, max(1, dim // 2))
        self.fuse = Conv2dNormActivation(2 * dim, dim, 3)

    def forward(self, maps: Sequence[Tensor], region_logits: Tensor | None = None) -> Tensor:
        """region_logits: [B, K, ...] of any size. Returns [B, dim, h, w] of the last map's size."""
        assert region_logits is not None, "OCR needs the logits of an auxiliary head"
        pixels_BDhw = self.pixels(maps[-1])
        logits = upsample(region_logits, pixels_BDhw.shape[-2:])
        share_BKN = logits.flatten(2).softmax(dim=2)
        objects_BDK = torch.einsum("bkn,bdn->bdk", share_BKN, pixels_BDhw.flatten(2))
        context = self.attention(pixels_BDhw, objects_BDK[..., None])
        return self.fuse(torch.cat([context, pixels_BDhw], dim=1))
