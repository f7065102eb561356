"""Context within the image: what a segmenter adds to the map of its backbone's last stage.

    PyramidPooling   PSPNet's pyramid pooling     AtrousPyramid    DeepLabV3's dilated convolutions
    ObjectContext    OCRNet's object regions      FeaturePyramid   UPerNet's feature pyramid

    module = build_context("aspp", backbone.stages, dim=512)
    context = module(maps, region_logits)         # [B, dim, h, w]; only OCR looks at the regions

Shape letters: B images, h x w positions, N = h w, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from memseg_dist.nn.attention import MapAttention
from memseg_dist.nn.backbone import FeatureStage
from memseg_dist.nn.resize import upsample

ContextKind = Literal["none", "ppm", "aspp", "ocr", "uper"]


def build_context(
    kind: ContextKind,
    stages: Sequence[FeatureStage],
    dim: int,
    *,
    bins: Sequence[int] = (1, 2, 3, 6),
    rates: Sequence[int] = (12, 24, 36),
) -> nn.Module | None:
    """None for "none" (FCN). dim: channels of the result. ValueError for stages that do not fit."""
    last = stages[-1].dim
    if kind == "none":
        return None
    if kind == "ppm":
        return PyramidPooling(last, dim, bins)
    if kind == "aspp":
        return AtrousPyramid(last, dim, rates)
    if kind == "ocr":
        return ObjectContext(last, dim)
    if len(stages) < 2:
        raise ValueError(
            f"context 'uper' joins the maps of several stages, and {len(stages)} is asked for; "
            "give method.stages two or more"
        )
    return FeaturePyramid([stage.dim for stage in stages], dim, bins)


class PyramidPooling(nn.Module):
    """PSPNet's pyramid pooling module (Zhao et al. 2017).

    out = conv3x3([x, up(conv1x1(pool_1(x))), up(conv1x1(pool_2(x))), ...])

    bins: sides of the pooled maps. dim: channels of each of them and of the result.
    """

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


class AtrousPyramid(ASPP):
    """DeepLabV3's atrous spatial pyramid pooling (Chen et al. 2017): torchvision's, but for the
    last convolution, which is 3 x 3 here as in the segmentation toolboxes (and without dropout).

    rates: dilations of the 3 x 3 convolutions beside the 1 x 1 and the pooled branch.
    """

    def __init__(self, in_dim: int, dim: int, rates: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__(in_dim, list(rates), dim)
        self.project = Conv2dNormActivation(len(self.convs) * dim, dim, 3)  # type: ignore[assignment]

    def forward(self, maps: Sequence[Tensor], region_logits: Tensor | None = None) -> Tensor:
        """maps: of the stages; only the last counts. Returns [B, dim, h, w] of its size."""
        return super().forward(maps[-1])


class ObjectContext(nn.Module):
    """OCRNet's object-contextual representations (Yuan et al. 2020).

    x_n = conv3x3(map)_n                                            pixel representations
    o_k = sum_n softmax_n(region_kn) x_n                            object region representations
    y_n = g_o( sum_k softmax_k(g_q(x_n) . g_k(o_k) / sqrt(d)) g_v(o_k) )
    out = conv3x3([y, x])

    Its regions are the logits of an auxiliary head on an earlier stage.
    """

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


class FeaturePyramid(nn.Module):
    """UPerNet's head (Xiao et al. 2018): pyramid pooling on the last stage, and a feature pyramid.

    p_last = PPM(x_last);   p_i = conv1x1(x_i) + up(p_{i+1})
    out = conv3x3([up(conv3x3(p_1)), ..., up(p_last)])              at the size of the first map

    in_dims: channels of the maps, the finest first. dim: channels of every level and of out.
    """

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
