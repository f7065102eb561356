"""A backbone that is nothing but one strided convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.nn.backbone import FeatureStage


class Patches(nn.Module):
    """uint8 images -> one map [B, dim, H / stride, W / stride], filled up to whole strides."""

    def __init__(self, dim: int, stride: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dim, self.stride = dim, stride
        self.stages = (FeatureStage(dim, stride),)
        self.conv = nn.Conv2d(3, dim, stride, stride, dtype=dtype)

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        filled = F.pad(
            images, [side for n in images.shape[:1:-1] for side in (0, -n % self.stride)]
        )
        return (self.conv(filled.to(self.conv.weight.dtype) / 255),)
