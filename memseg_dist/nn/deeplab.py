"""DeepLabV2's head (Chen et al. 2017): parallel dilated convolutions whose outputs are added.

    logits = sum over rates r of conv3x3(features, dilation r) + bias

Shape letters: B images, h x w positions, D channels, C classes of the label space, K asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.01


class DeepLabV2Head(nn.Module):
    """One 3 x 3 convolution from D channels to C classes per rate. ValueError without any rate."""

    def __init__(self, in_dim: int, num_classes: int, rates: Sequence[int] = (6, 12, 18, 24)):
        super().__init__()
        if not rates or min(rates) < 1:
            raise ValueError(f"rates of the head are {tuple(rates)}; give one or more, from 1 up")
        self.rates = tuple(rates)
        shape = (len(self.rates), num_classes, in_dim, 3, 3)
        self.weight = nn.Parameter(INIT_STD * torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features_BDhw: Tensor, class_ids_K: Tensor) -> Tensor:
        """Logits [B, K, h, w] of the classes asked for."""
        logits_BKhw = self.bias[class_ids_K][:, None, None]
        for rate, weight_CDyx in zip(self.rates, self.weight):
            logits_BKhw = logits_BKhw + F.conv2d(
                features_BDhw, weight_CDyx[class_ids_K], padding=rate, dilation=rate
            )
        return logits_BKhw
