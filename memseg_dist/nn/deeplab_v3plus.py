"""DeepLabV3+ (Chen et al. 2018): a pyramid of dilated convolutions on the deepest map, and a
decoder that joins it with a finer one.

    context = project(concat of pool, 1 x 1, three dilated 3 x 3 of the deepest map)
    logits = classify(refine(concat of upsampled context, reduced finer map))

Dilated convolutions and the decoder's are separable, as in the authors' code: depthwise, then
pointwise, each with BatchNorm and ReLU. Differences: BatchNorm's running statistics move by 0.1 a
step (theirs by 0.0003, for runs of 30,000 steps), and maps are enlarged with
`align_corners=False`, as everywhere here.

Shape letters: B images, h x w positions of the finer map, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPPPooling
from torchvision.ops import Conv2dNormActivation

from memseg_dist.nn.resize import upsample

INIT_STD = 0.01


class DeepLabV3Plus(nn.Module):
    """fine_dim, deep_dim: channels of the two maps. rates: dilations on the deepest map. dim: of
    everything inside; reduced_dim: of the finer map before it is joined.
    """

    def __init__(
        self,
        fine_dim: int,
        deep_dim: int,
        num_classes: int,
        *,
        rates: Sequence[int] = (6, 12, 18),
        dim: int = 256,
        reduced_dim: int = 48,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        branches = [
            ASPPPooling(deep_dim, dim),
            Conv2dNormActivation(deep_dim, dim, 1),
            *(separable_conv(deep_dim, dim, rate) for rate in rates),
        ]
        self.branches = nn.ModuleList(branches)
        self.project = Conv2dNormActivation(len(branches) * dim, dim, 1)
        self.dropout = nn.Dropout(dropout)
        self.reduce = Conv2dNormActivation(fine_dim, reduced_dim, 1)
        self.refine = nn.Sequential(
            separable_conv(dim + reduced_dim, dim), separable_conv(dim, dim)
        )
        self.classify = nn.Conv2d(dim, num_classes, 1)
        nn.init.trunc_normal_(self.classify.weight, std=INIT_STD)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def features(self, fine: Tensor, deep: Tensor) -> Tensor:
        """What `classify` reads: [B, dim, h, w]."""
        context = self.project(torch.cat([branch(deep) for branch in self.branches], dim=1))
        context = upsample(self.dropout(context), fine.shape[-2:])
        return self.refine(torch.cat([context, self.reduce(fine)], dim=1))

    def forward(self, fine: Tensor, deep: Tensor) -> Tensor:
        """fine: [B, fine_dim, h, w]; deep: [B, deep_dim, ...]. Logits [B, K, h, w]."""
        return self.classify(self.features(fine, deep))


def separable_conv(in_dim: int, dim: int, rate: int = 1) -> nn.Sequential:
    """3 x 3 by channel with dilation `rate`, then 1 x 1; each with BatchNorm and ReLU."""
    return nn.Sequential(
        Conv2dNormActivation(in_dim, in_dim, 3, groups=in_dim, dilation=rate),
        Conv2dNormActivation(in_dim, dim, 1),
    )
