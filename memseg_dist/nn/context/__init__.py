"""Context within the image: what a segmenter adds to the map of its backbone's last stage.

    ppm.py    PSPNet's pyramid pooling            aspp.py   DeepLabV3's dilated convolutions
    ocr.py    OCRNet's object regions             uper.py   UPerNet's feature pyramid

    module = build_context("aspp", backbone.stages, dim=512)
    context = module(maps, region_logits)         # [B, dim, h, w]; only OCR looks at the regions

Shape letters: B images, h x w positions, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from memseg_dist.nn.backbone import FeatureStage
from memseg_dist.nn.context.aspp import AtrousPyramid
from memseg_dist.nn.context.ocr import ObjectContext
from memseg_dist.nn.context.ppm import PyramidPooling
from memseg_dist.nn.context.uper import FeaturePyramid

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
