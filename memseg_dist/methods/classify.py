"""Image classification: what every one of the papers starts its backbone from.

Cross-entropy of globally averaged features; with several labels, the mean over them. Prediction is
the class activation map, so the same evaluation applies. `jobs/pretrain_scenes.py` uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.batch import Batch, Clock, onto_device
from memseg_dist.checks import Share, check_numbers
from memseg_dist.methods.method import LinearLogits, Method, MethodConfig
from memseg_dist.methods.pairs import check_source

if TYPE_CHECKING:
    from memseg_dist.methods.setup import Setup
    from memseg_dist.nn.backbone import Backbone


@dataclass(frozen=True)
class ClassifyConfig(MethodConfig):
    kind: Literal["classify"] = "classify"
    label_smoothing: Share = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        check_numbers(self, "method.")

    def build(self, setup: Setup) -> Classify:
        backbone = setup.build_backbone()
        return Classify(backbone, self, num_classes=setup.num_classes, classes=setup.classes)


class Classify(Method):
    """classes: per source, the label-space ids of its vocabulary; others take no part in it."""

    is_outside: Tensor

    def __init__(
        self,
        backbone: Backbone,
        config: ClassifyConfig,
        *,
        num_classes: int,
        classes: Mapping[str, np.ndarray],
    ) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        self.classifier = nn.Linear(backbone.dim, num_classes)
        is_outside = torch.ones(len(classes), num_classes, dtype=torch.bool)
        for row, ids in zip(is_outside, classes.values()):
            row[torch.as_tensor(ids, dtype=torch.int64)] = False
        self.register_buffer("is_outside", is_outside, persistent=False)
        self._source_row = {name: row for row, name in enumerate(classes)}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        check_source(batch, self._source_row)
        (features_BDhw,) = self.backbone(batch.images, batch.valid)
        logits_BC = self.classifier(features_BDhw.mean(dim=(2, 3)))
        is_outside_C = self.is_outside[self._source_row[batch.source]]
        logits_BC = logits_BC.masked_fill(is_outside_C, -1e4)  # finite: smoothing touches all
        image = [b for b, labels in enumerate(batch.labels) for _ in labels]
        label = [label for labels in batch.labels for label in labels]
        image_R, label_R = onto_device(
            logits_BC.device, np.array(image, np.int64), np.array(label, np.int64)
        )
        loss = F.cross_entropy(
            logits_BC[image_R],
            label_R,
            label_smoothing=self.config.label_smoothing,
            reduction="sum",
        )
        return {"classification": loss / max(len(label), 1)}

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor) -> LinearLogits:
        weight, bias = self.classifier.weight[classes], self.classifier.bias[classes]
        (features,) = self.backbone(images)
        return LinearLogits(features, weight, bias, stride=self.stride)

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """The class's activation map over its maximum; zero where no position speaks for it."""
        index = torch.as_tensor(classes, device=images.device)
        own = torch.arange(len(index), device=images.device)
        activation_Bhw = self.activations(images, index)[own, own]
        peak_B11 = activation_Bhw.amax(dim=(1, 2), keepdim=True)
        return {"activation": activation_Bhw / peak_B11.clamp_min(torch.finfo(peak_B11.dtype).tiny)}

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        (features,) = self.backbone(images)
        return F.normalize(features, dim=1)
