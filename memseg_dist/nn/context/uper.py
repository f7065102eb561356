"""UPerNet's head (Xiao et al. 2018): pyramid pooling on the last stage, and a feature pyramid.

p_last = PPM(x_last);   p_i = conv1x1(x_i) + up(p_{i+1})
out = conv3x3([up(conv3x3(p_1)), ..., up(p_last)])              at the size of the first map
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from memseg_dist.nn.context.ppm import PyramidPooling
from memseg_dist.nn.resize import upsample


class FeaturePyramid(nn.Module):
    """in_dims: channels of the maps, the finest first. dim: channels of every level and of out."""

    def __init__(
        self, in_dims: Sequence[int], dim: int, bins: Sequence[int] = (1, 2, 3, 6)
    ) -> None:
        super().__init__()
        earlier = in_dims[:-1]
        self.pool = PyramidPooling(in_dims[-1], dim, bins)
        self.lateral = nn.ModuleList(Conv2dNormActivation(width, dim, 1) for width in earlier)
        self.smooth = nn.ModuleList(Conv2dNormActivation(dim, dim, 3) for _ in earlier)
        self.fuse = Conv2dNormActivation(len(in_dims) * dim, dim, 3)

    def forward(self, maps: Sequence[Tensor], region_logits: Tensor | None = None) -> Tensor:
        """maps: the finest first. Returns [B, dim, h, w] of the finest's size."""
        levels = [self.pool(maps)]
        for lateral, map in zip(reversed(self.lateral), reversed(maps[:-1])):
            levels.insert(0, lateral(map) + upsample(levels[0], map.shape[-2:]))
        smooth = [convolve(level) for convolve, level in zip(self.smooth, levels)]
        size = maps[0].shape[-2:]
        return self.fuse(torch.cat([upsample(x, size) for x in (*smooth, levels[-1])], dim=1))
