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
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.losses.segmentation import Denominator, pixel_cross_entropy
from memseg_dist.methods.method import LinearLogits, Method
from memseg_dist.models.deeplab import DeepLabV2Head


@dataclass(frozen=True)
class SegmentConfig:
    kind: Literal["segment"] = "segment"
    head: Literal["deeplabv2", "linear"] = "deeplabv2"
    rates: tuple[int, ...] = (6, 12, 18, 24)
    """Dilations of DeepLabV2's head."""
    seg_denominator: Denominator = "valid"
    """Divide the loss by the labelled pixels, or by all."""


class Segment(Method):
    """backbone: uint8 images, valid -> [B, D, h, w], with attribute `dim`.

    classes: per source, the sorted label-space ids [N] of its vocabulary; masks are IGNORE or hold
    these, and any other class counts as IGNORE.
    """

    def __init__(
        self,
        backbone: nn.Module,
        config: SegmentConfig,
        *,
        num_classes: int,
        classes: Mapping[str, np.ndarray],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        dim: int = backbone.dim  # type: ignore[assignment]
        if config.head == "deeplabv2":
            self.head: nn.Module = DeepLabV2Head(dim, num_classes, config.rates)
        else:
            self.head = nn.Linear(dim, num_classes)
        self.classes, self._column = {}, {}
        for name, ids in classes.items():
            ids_N = torch.as_tensor(ids, dtype=torch.int64, device=device)
            column_C = torch.full((num_classes,), IGNORE, device=device)
            column_C[ids_N] = torch.arange(len(ids_N), device=device)
            self.classes[name], self._column[name] = ids_N, column_C

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """ValueError for a batch of an unknown source or without masks."""
        if batch.source not in self.classes:
            raise ValueError(f"source '{batch.source}' is not one of {sorted(self.classes)}")
        if batch.masks is None:
            raise ValueError(
                f"source '{batch.source}' has supervision '{batch.supervision}'; plain "
                "segmentation learns from masks alone: use 'masks' or leave the source out"
            )
        logits = self._logits(self.backbone(batch.images, batch.valid), self.classes[batch.source])
        target_BHW = self._column[batch.source][batch.masks.clamp_min(0)]
        target_BHW = target_BHW.masked_fill(batch.masks == IGNORE, IGNORE)
        with torch.autocast(target_BHW.device.type, enabled=False):
            loss = pixel_cross_entropy(
                logits.features,
                logits.weight,
                target_BHW,
                bias_N=logits.bias,
                denominator=self.config.seg_denominator,
            )
        return {"seg": loss}

    def _logits(self, features_BDhw: Tensor, class_ids_K: Tensor) -> LinearLogits:
        if isinstance(self.head, DeepLabV2Head):
            logits_BKhw = self.head(features_BDhw, class_ids_K).float()
            return LinearLogits(logits_BKhw, torch.eye(len(class_ids_K), device=logits_BKhw.device))
        assert isinstance(self.head, nn.Linear)
        weight, bias = self.head.weight[class_ids_K], self.head.bias[class_ids_K]
        return LinearLogits(features_BDhw.float(), weight, bias)

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> LinearLogits:
        return self._logits(self.backbone(images), classes)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.backbone(images).float(), dim=1)
