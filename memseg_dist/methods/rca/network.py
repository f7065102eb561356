"""The network of RCA above its backbone: maps P, aggregation of prototypes, maps O (Eq. 1, 7 - 10).

Shape letters: B images, D channels, h x w positions, L classes with a map, M channels of O (L, or
with saliency one more: the background, the last), P prototypes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from memseg_dist.methods.method import Prediction
from memseg_dist.methods.rca.aggregation import LinearAggregation, PrototypeAttention
from memseg_dist.methods.rca.cam import Cam
from memseg_dist.methods.rca.config import RING_CAPACITY, RCAConfig
from memseg_dist.methods.rca.prototypes import Prototypes
from memseg_dist.nn.batchnorm import record_batchnorm


class Network(nn.Module):
    """`cam` gives P (Eq. 1), `final` gives O; `reduce` embeds features for memory and aggregation.

    in_dim: channels of the backbone's map. class_ids: label-space ids [L], one map each.

    dim: channels of the memory, its prototypes and the regions.
    """

    def __init__(self, in_dim: int, class_ids: np.ndarray, config: RCAConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = dim = config.reduce_to or in_dim
        self.reduce = nn.Conv2d(in_dim, dim, 1) if config.reduce_to else nn.Identity()
        self.cam = Cam(in_dim, len(class_ids), config.head, config.head_width)
        self.attention = PrototypeAttention(config.attention_scale, config.attention_temperature)
        self.linear = LinearAggregation(dim) if config.aggregation == "linear" else None
        final_dim = {"attention": in_dim + dim, "linear": dim, "off": in_dim}[config.aggregation]
        num_channels = len(class_ids) + (config.saliency_weight > 0)
        self.final_cam = Cam(final_dim, num_channels, config.final_head, config.head_width)
        self.project = _projector(dim) if config.projector else nn.Identity()
        # there are none before the first clustering; the code starts from noise
        reads_noise = config.noise and config.aggregation != "off"
        per_class = (config.num_prototypes or RING_CAPACITY) if reads_noise else 0
        classes = torch.from_numpy(class_ids).repeat_interleave(per_class)
        vectors = torch.randn(len(classes), dim)
        self.prototypes = Prototypes(vectors, classes, torch.zeros_like(classes))

    def final(self, features: Tensor, embedded: Tensor) -> Tensor:
        """O [B, M, h, w], Eq. 10. embedded: `reduce(features)`, here and below."""
        return self.final_cam(self.aggregated(features, embedded))

    def activated(self, o_BMhw: Tensor) -> Tensor:
        """O as class activation maps [B, L, h, w] of 0 or more: relu, and with EPS its shares."""
        if self.config.saliency_weight > 0:
            return o_BMhw.softmax(dim=1)[:, :-1]
        return o_BMhw.relu()

    def prediction(self, features: Tensor, columns_K: Tensor, stride: int) -> Prediction:
        """O of some of the classes. stride: pixels per position."""
        aggregated = self.aggregated(features, self.reduce(features))
        return self.final_cam.prediction(aggregated, columns_K, stride)

    def aggregated(self, features: Tensor, embedded: Tensor) -> Tensor:
        """F^ of Eq. 9, [F, F']."""
        if self.config.aggregation == "off":
            return features
        if self.linear is not None:
            return self.linear(embedded, self.prototypes.vectors)
        return torch.cat([features, self.attention(embedded, self.prototypes.vectors)], dim=1)

    @torch.no_grad()
    def pictures(self, features: Tensor, class_ids: Tensor, column: Tensor) -> dict[str, Tensor]:
        """P and O of one class per image, and the affinity S (Eq. 7) to the class's two busiest
        prototypes there: each over its maximum, [B, h, w].
        """
        rows, embedded = torch.arange(len(features), device=features.device), self.reduce(features)
        shown = {
            "P": self.cam(features).relu()[rows, column],
            "O": self.activated(self.final(features, embedded))[rows, column],
        }
        if self.config.aggregation == "attention" and len(self.prototypes):
            affinity_BPhw = self.attention.affinity(embedded, self.prototypes.vectors)
            is_own_BP = self.prototypes.classes == class_ids[:, None]
            affinity_BPhw = affinity_BPhw * is_own_BP[:, :, None, None]
            busiest = affinity_BPhw.sum(dim=(2, 3)).argsort(dim=1, descending=True)
            for number in range(min(2, busiest.shape[1])):
                shown[f"prototype {number + 1}"] = affinity_BPhw[rows, busiest[:, number]]
        return {name: _over_maximum(map_Bhw) for name, map_Bhw in shown.items()}


def _over_maximum(map_Bhw: Tensor) -> Tensor:
    return map_Bhw / map_Bhw.amax(dim=(1, 2), keepdim=True).clamp_min(1e-5)


def _projector(dim: int) -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(dim, dim, 3, padding=1),
        nn.BatchNorm2d(dim),
        nn.ReLU(inplace=True),
        nn.Conv2d(dim, dim, 3, padding=1),
    )
    return record_batchnorm(layers)
