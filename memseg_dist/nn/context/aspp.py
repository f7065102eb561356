"""DeepLabV3's atrous spatial pyramid pooling (Chen et al. 2017): torchvision's, but for the last
convolution, which is 3 x 3 here as in the segmentation toolboxes (and without dropout).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation


class AtrousPyramid(ASPP):
    """rates: dilations of the 3 x 3 convolutions beside the 1 x 1 and the pooled branch."""

    def __init__(self, in_dim: int, dim: int, rates: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__(in_dim, list(rates), dim)
        self.project = Conv2dNormActivation(len(self.convs) * dim, dim, 3)  # type: ignore[assignment]

    def forward(self, maps: Sequence[Tensor], region_logits: Tensor | None = None) -> Tensor:
        """maps: of the stages; only the last counts. Returns [B, dim, h, w] of its size."""
        return super().forward(maps[-1])
