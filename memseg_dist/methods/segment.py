"""Plain supervised segmentation: what a network is trained with once every image has a mask.

    L = mean over the labelled pixels of -log softmax_k(up(logits))[target]

The masks may be pseudo labels, IGNORE where nobody knows. The head is DeepLabV2's or one 1 x 1
convolution. Logits are made at the resolution of the features and over the classes of the source;
the loss enlarges them to the size of the masks strip by strip (`losses.segmentation`).

Shape letters: B images, H x W pixels, h x w positions, D channels, C classes of the label space,
N of the source, K asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.methods.method import DenseLogits, LinearLogits, Method, MethodConfig
from memseg_dist.methods.pairs import check_masks_only, check_source, columns_of, to_columns
from memseg_dist.nn.deeplab import DeepLabV2Head
from memseg_dist.nn.pixel_loss import Denominator, pixel_cross_entropy
from memseg_dist.nn.resize import fill_up

if TYPE_CHECKING:
    from memseg_dist.methods.setup import Setup
    from memseg_dist.nn.backbone import Backbone


@dataclass(frozen=True)
class SegmentConfig(MethodConfig):
    kind: Literal["segment"] = "segment"
    head: Literal["deeplabv2", "linear"] = "deeplabv2"
    """DeepLabV2's parallel dilated convolutions, or one 1 x 1 convolution."""
    rates: tuple[int, ...] = (6, 12, 18, 24)
    """Dilations of DeepLabV2's head."""
    seg_denominator: Denominator = "valid"
    """Divide the loss by the labelled pixels, or by all."""

    def build(self, setup: Setup) -> Segment:
        backbone = setup.build_backbone()
        return Segment(
            backbone,
            self,
            num_classes=setup.num_classes,
            classes=setup.classes,
            device=setup.device,
        )

    def check(self, setup: Setup) -> None:
        check_masks_only(setup.sources, "plain segmentation")


class Segment(Method):
    """classes: per source, the sorted label-space ids [N] of its vocabulary; masks are IGNORE or
    hold these, and any other class counts as IGNORE.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: SegmentConfig,
        *,
        num_classes: int,
        classes: Mapping[str, np.ndarray],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        if config.head == "deeplabv2":
            self.head: nn.Module = DeepLabV2Head(backbone.dim, num_classes, config.rates)
        else:
            self.head = nn.Linear(backbone.dim, num_classes)
        self.classes, self._column = {}, {}
        for name, ids in classes.items():
            self.classes[name] = torch.as_tensor(ids, dtype=torch.int64, device=device)
            column_C = columns_of(ids, num_classes)
            self._column[name] = torch.as_tensor(column_C, device=device)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """ValueError for a batch of an unknown source."""
        check_source(batch, self.classes)
        assert batch.masks is not None, "check lets no source without masks come here"
        (features,) = self.backbone(batch.images, batch.valid)
        logits = self._logits(features, self.classes[batch.source])
        # a crop of 321 pixels becomes 41 whole positions of 8
        masks_BHW = fill_up(batch.masks, self.stride, IGNORE)
        target_BHW = to_columns(masks_BHW, self._column[batch.source])
        divide_by = self.config.seg_denominator
        if isinstance(logits, DenseLogits):
            loss = pixel_cross_entropy(logits.logits, None, target_BHW, denominator=divide_by)
        else:
            loss = pixel_cross_entropy(
                logits.features,
                logits.weight,
                target_BHW,
                bias_N=logits.bias,
                denominator=divide_by,
            )
        # "all" are the pixels of the crop, without those that it was filled up by
        filled_by = masks_BHW.numel() / batch.masks.numel() if divide_by == "all" else 1
        return {"seg": loss * filled_by}

    def _logits(self, features_BDhw: Tensor, class_ids_K: Tensor) -> DenseLogits | LinearLogits:
        if isinstance(self.head, DeepLabV2Head):
            return DenseLogits(self.head(features_BDhw, class_ids_K), self.stride)
        assert isinstance(self.head, nn.Linear)
        weight, bias = self.head.weight[class_ids_K], self.head.bias[class_ids_K]
        return LinearLogits(features_BDhw, weight, bias, stride=self.stride)

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> DenseLogits | LinearLogits:
        (features,) = self.backbone(images)
        return self._logits(features, classes)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        (features,) = self.backbone(images)
        return F.normalize(features, dim=1)
