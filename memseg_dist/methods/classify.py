"""Image classification: what every one of the papers starts its backbone from.

Cross-entropy of globally averaged features; with several labels, the mean over them. Prediction is
the class activation map, so the same evaluation applies. `jobs/pretrain_scenes.py` uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.batch import Batch, Clock
from memseg_dist.methods.method import LinearLogits, Method


@dataclass(frozen=True)
class ClassifyConfig:
    kind: Literal["classify"] = "classify"
    label_smoothing: float = 0.0


class Classify(Method):
    """backbone: uint8 images, valid -> [B, D, h, w], with attribute `dim`."""

    is_outside: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        config: ClassifyConfig,
        *,
        num_classes: int,
        classes: Mapping[str, np.ndarray],
    ) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        self.classifier = nn.Linear(backbone.dim, num_classes)  # type: ignore[arg-type]
        is_outside = torch.ones(len(classes), num_classes, dtype=torch.bool)
        for row, ids in zip(is_outside, classes.values()):
            row[torch.as_tensor(ids, dtype=torch.int64)] = False
        self.register_buffer("is_outside", is_outside, persistent=False)
        self._source_row = {name: row for row, name in enumerate(classes)}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        features_BDhw = self.backbone(batch.images, batch.valid)
        with torch.autocast(features_BDhw.device.type, enabled=False):
            logits_BC = self.classifier(features_BDhw.float().mean(dim=(2, 3)))
            is_outside_C = self.is_outside[self._source_row[batch.source]]
            logits_BC = logits_BC.masked_fill(is_outside_C, -1e4)  # finite: smoothing touches all
            image = [b for b, labels in enumerate(batch.labels) for _ in labels]
            label = [label for labels in batch.labels for label in labels]
            loss = F.cross_entropy(
                logits_BC[torch.tensor(image, dtype=torch.int64, device=logits_BC.device)],
                torch.tensor(label, dtype=torch.int64, device=logits_BC.device),
                label_smoothing=self.config.label_smoothing,
                reduction="sum",
            )
        return {"classification": loss / max(len(label), 1)}

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> LinearLogits:
        weight, bias = self.classifier.weight[classes], self.classifier.bias[classes]
        return LinearLogits(self.backbone(images).float(), weight, bias)

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """The class's activation map over its maximum; zero where no position speaks for it."""
        index = torch.as_tensor(classes, device=images.device)
        logits = self.predict(images, index)
        own = torch.arange(len(index), device=images.device)
        activation_Bhw = logits.dense()[own, own].relu()
        peak_B11 = activation_Bhw.amax(dim=(1, 2), keepdim=True)
        return {"activation": activation_Bhw / peak_B11.clamp_min(torch.finfo(peak_B11.dtype).tiny)}

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.backbone(images).float(), dim=1)
