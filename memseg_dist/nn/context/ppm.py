"""PSPNet's pyramid pooling module (Zhao et al. 2017).

out = conv3x3([x, up(conv1x1(pool_1(x))), up(conv1x1(pool_2(x))), ...])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from memseg_dist.nn.resize import upsample


class PyramidPooling(nn.Module):
    """bins: sides of the pooled maps. dim: channels of each of them and of the result."""

    def __init__(self, in_dim: int, dim: int, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.pooled = nn.ModuleList(Conv2dNormActivation(in_dim, dim, 1) for _ in self.bins)
        self.fuse = Conv2dNormActivation(in_dim + len(self.bins) * dim, dim, 3)

    def forward(self, maps: Sequence[Tensor], region_logits: Tensor | None = None) -> Tensor:
        """maps: of the stages; only the last counts. Returns [B, dim, h, w] of its size."""
        last = maps[-1]
        levels = [
            upsample(convolve(F.adaptive_avg_pool2d(last, side)), last.shape[-2:])
            for side, convolve in zip(self.bins, self.pooled)
        ]
        return self.fuse(torch.cat([last, *levels], dim=1))
