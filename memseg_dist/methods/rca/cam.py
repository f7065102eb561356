"""Class-activation heads: a feature map to one activation map per class.

Shape letters: B images, D channels, h x w positions, L classes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from memseg_dist.methods.method import DenseLogits, LinearLogits, Prediction

CamHead = Literal["linear", "trunk", "per_class"]
INIT_STD = 0.01


class Cam(nn.Module):
    """F_CAM of RCA: [B, D, h, w] -> [B, L, h, w].

    "linear": one 1 x 1 convolution (the paper). "trunk": three 3 x 3 convolutions with ReLU that
    all classes share, then 1 x 1 (P in the code). "per_class": such a trunk for every class
    (O in the code: 79 % of its multiplications).
    """

    def __init__(
        self, in_channels: int, num_classes: int, head: CamHead = "linear", width: int = 512
    ) -> None:
        super().__init__()
        self.head = head
        groups = num_classes if head == "per_class" else 1
        layers: list[nn.Module] = []
        channels = in_channels
        if head != "linear":
            for number in range(3):
                conv_groups = groups if number else 1
                layers += [
                    nn.Conv2d(channels, groups * width, 3, padding=1, groups=conv_groups),
                    nn.ReLU(inplace=True),
                ]
                channels = groups * width
        self.trunk = nn.Sequential(*layers)
        self.score = nn.Conv2d(channels, num_classes, 1, groups=groups)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=INIT_STD)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, features_BDhw: Tensor) -> Tensor:
        return self.score(self.trunk(features_BDhw))

    def prediction(self, features_BDhw: Tensor, columns_K: Tensor, stride: int) -> Prediction:
        """The maps of `columns`, [B, K, h, w]. stride: pixels per position."""
        if self.head == "per_class":
            return DenseLogits(self(features_BDhw)[:, columns_K], stride)
        assert self.score.bias is not None
        weight = self.score.weight[columns_K, :, 0, 0]
        bias = self.score.bias[columns_K]
        return LinearLogits(self.trunk(features_BDhw), weight, bias, stride=stride)
