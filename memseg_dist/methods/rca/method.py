"""RCA: Regional Semantic Contrast and Aggregation for weakly supervised segmentation (CVPR 2022).

Image labels teach a classifier whose activation maps (CAM) say where a class is. A memory holds
what the region of each class looked like in every image; regions are contrasted with all of it
(RSC), and its prototypes are read into every image's features (RSA).

    L = alpha_1 L_RM-NCE + alpha_2 BCE(GAP(P), y) + BCE(GAP(O), y)                        (Eq. 11)

The baselines are the same class: OAA is `contrast_weight=0, aggregation="off"`; EPS adds
`saliency_weight=1`. OAA+ and OAA++ of the paper's tables train a second net on OAA's maps (integral
attention), which neither the code nor this has. The paper does not say how it stands on EPS. Here O
then has L + 1 channels, the background the last, and its maps are what EPS's loss supervises: a
softmax over all L + 1, not relu(O). P, which no saliency teaches, keeps L channels.

Where the paper is silent or differs from its official code, the decision, and the flag that gives
the other behaviour (`config.released()` sets them all as the code has them):

 1  F_CAM is one 1 x 1 convolution                                             `head`, `final_head`
 2  aggregation: softmax attention without weights, scaled by 1 / sqrt(D)      `aggregation`, ...
 3  no aggregation before the first clustering: F' = 0                         `noise`
 4  a row per (class, image), the first write copies                           `keying`, `noise`
 5  M: the map over its own mean, not its softmax over the classes             `region_mask`
 6  a region is remembered if sigmoid(GAP(O)) > 0.7                            `gate_by`
 7  query and memory in one space                                              `projector`
 8  mixup partner of another image and class, from the global batch            `mixup_pair`, ...
 9  mean of the contrast over images, not their sum                            `contrast_reduction`
10  contrast after one epoch                                                   `warmup_epochs`
11  prototypes of set rows alone, seeded k-means, once                         `kmeans_starts`, ...
12  regions of one image are pooled each by its own mask (the code zeroes what earlier classes used)
13  an image without labels is a negative of every class; a blanked one counts for nothing
14  memory and prototypes move after the step, for all slots at once (the code: within forward)

Shape letters: B images of the slot, D channels, N = h w positions, L classes with a map, M
channels of O (L, or L + 1), R (image, label) pairs of the slot, P prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import Batch, Clock, derive_seed
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.methods.method import Method, Prediction, memory_figures
from memseg_dist.methods.pairs import LabelPairs, check_source, columns_of
from memseg_dist.methods.rca.accumulate import MapAccumulator
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.methods.rca.contrast import RegionContrast, image_ids
from memseg_dist.methods.rca.memory import TrainingSet, region_memory
from memseg_dist.methods.rca.network import Network
from memseg_dist.methods.rca.regions import (
    label_targets,
    masked_mean,
    multi_label_loss,
    region_masks,
    region_means,
)
from memseg_dist.methods.rca.saliency_loss import saliency_loss
from memseg_dist.nn.resize import valid_positions

if TYPE_CHECKING:
    from memseg_dist.nn.backbone import Backbone


class RCA(Method):
    """The classifier, its losses, its memory and its prototypes.

    classes: per source, the sorted label-space ids of its vocabulary. training: None for a model
    that only predicts; it has prototypes and no memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: RCAConfig,
        *,
        classes: Mapping[str, np.ndarray],
        num_classes: int,
        training: TrainingSet | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.class_ids = np.unique(np.concatenate(list(classes.values())))
        self._column = columns_of(self.class_ids, num_classes)
        self._source_columns = {
            name: torch.as_tensor(self._column[ids], device=device) for name, ids in classes.items()
        }
        self.backbone = backbone
        self.net = net = Network(backbone.dim, self.class_ids, config)
        self.memory = self.contrast = self.accumulated = None
        if training is None:
            return
        self.epoch_steps, self.num_steps = training.epoch_steps, training.num_steps
        if config.contrast_weight > 0 or config.aggregation != "off":
            regions, class_ids = training.regions, self.class_ids
            self.memory = region_memory(config, regions, class_ids, net.dim, seed, device)
            first_step = config.warmup_epochs * training.epoch_steps
            empty_0D = torch.empty(0, net.dim, device=device)
            self.contrast = RegionContrast(config, self.memory, first_step, empty_0D)
        if config.map_size:
            fill_from = training.num_steps - training.epoch_steps
            self.accumulated = MapAccumulator(config, training.regions, fill_from, device)

    # ---------------------------------------------------------------- training

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        config, net, pairs = self.config, self.net, self._pairs(batch)
        (features,) = self.backbone(batch.images, batch.valid)
        valid_BN = valid_positions(batch.valid, self.stride)
        embedded = net.reduce(features)
        p_BLhw, o_BMhw = net.cam(features), net.final(features, embedded)  # Eq. 1; Eq. 7 - 10
        p_BL = masked_mean(p_BLhw.flatten(2), valid_BN)
        o_BL = masked_mean(o_BMhw[:, : p_BL.shape[1]].flatten(2), valid_BN)
        target_BL = label_targets(batch, self._column, p_BL)
        losses = self._label_losses(batch, target_BL, p_BL, o_BL)  # Eq. 11
        if config.saliency_weight > 0:
            losses["saliency"] = config.saliency_weight * saliency_loss(
                o_BMhw,
                target_BL.bool(),
                batch.saliency,
                stride=self.stride,
                tau=config.saliency_overlap,
                foreground_weight=config.saliency_foreground,
            )
        # a crop without a position that is image passes no gate
        is_blank_B1 = ~valid_BN.any(dim=1, keepdim=True)
        score_BL = o_BL.sigmoid().masked_fill(is_blank_B1, -torch.inf)
        if self.accumulated is not None and clock.step >= self.epoch_steps:
            is_valid_B1hw = valid_BN.view_as(o_BMhw[:, :1])
            map_BLhw = net.activated(o_BMhw.detach()) * is_valid_B1hw
            map_Rhw = map_BLhw[pairs.image, pairs.column]
            score_R = score_BL[pairs.image, pairs.column]
            self.accumulated.propose(batch, pairs, map_Rhw, self.stride, score_R, clock)
        if self.memory is None or self.contrast is None:
            return losses
        mask_RN = self._masks(p_BLhw, valid_BN, pairs)
        region_RD = region_means(embedded.flatten(2), mask_RN, pairs.image)  # Eq. 2
        if config.gate_by == "intermediate":
            score_BL = p_BL.masked_fill(is_blank_B1, -torch.inf)
        is_sure_R = score_BL[pairs.image, pairs.column] > config.gate
        ids_R2 = np.stack([pairs.class_ids, image_ids(batch, pairs)], axis=1)
        ids = ids_R2[:, : self.memory.layout.num_ids]
        self.memory.propose(ids, region_RD, clock, weight=is_sure_R)  # Eq. 3
        if self.contrast.is_on(clock):
            query_RD = region_RD
            if config.projector:
                query_RD = self._queries(embedded, mask_RN, pairs)
            losses["contrast"] = self.contrast.loss(batch, pairs, query_RD, clock)  # Eq. 4 - 6
        return losses

    def _label_losses(
        self, batch: Batch, target_BL: Tensor, p_BL: Tensor, o_BL: Tensor
    ) -> dict[str, Tensor]:
        """BCE of Eq. 11, over the classes of the batch's source."""
        column, counts_B = self._source_columns[batch.source], batch.valid.flatten(1).any(dim=1)
        final = multi_label_loss(o_BL[:, column], target_BL[:, column], counts_B)
        between = multi_label_loss(p_BL[:, column], target_BL[:, column], counts_B)
        return {"final": final, "intermediate": self.config.intermediate_weight * between}

    def _masks(self, p_BLhw: Tensor, valid_BN: Tensor, pairs: LabelPairs) -> Tensor:
        rule, p_BLN = self.config.region_mask, p_BLhw.flatten(2)
        return region_masks(p_BLN, valid_BN, pairs.image, pairs.column, rule)

    def _queries(self, embedded: Tensor, mask_RN: Tensor, pairs: LabelPairs) -> Tensor:
        return region_means(self.net.project(embedded).flatten(2), mask_RN, pairs.image)

    def _pairs(self, batch: Batch) -> LabelPairs:
        check_source(batch, self._source_columns)
        return LabelPairs.of(batch, self._column, batch.images.device)

    # ---------------------------------------------------------------- the step as a whole

    @torch.no_grad()
    def before_step(self, slots: Sequence[tuple[Batch, Clock]], clock: Clock) -> None:
        """Mixing over the whole batch needs the query vectors of all slots before their losses."""
        if self.contrast is None or not self.contrast.needs_preview(clock):
            return
        for batch, slot_clock in slots:
            if slot_clock.idle:
                continue
            slot_clock.seed_forward()
            pairs = self._pairs(batch)
            (features,) = self.backbone(batch.images, batch.valid)
            valid_BN = valid_positions(batch.valid, self.stride)
            mask_RN = self._masks(self.net.cam(features), valid_BN, pairs)
            query_RD = self._queries(self.net.reduce(features), mask_RN, pairs)
            self.contrast.preview(batch, pairs, query_RD, slot_clock)
        self.contrast.exchange(clock)

    def after_step(self, clock: Clock) -> None:
        if self.accumulated is not None:
            self.accumulated.rows.commit(clock)
        if self.memory is None or self.contrast is None:
            return
        self.contrast.forget()
        self.memory.commit(clock)
        config, done = self.config, clock.step + 1
        # not after the last step: the final map would read prototypes that it never trained with
        is_due = done % (config.prototype_steps or self.epoch_steps) == 0
        if is_due and done < self.num_steps and config.aggregation != "off":
            seed = derive_seed(clock.seed, "prototypes", clock.step)
            self.net.prototypes.update(
                self.memory, config.num_prototypes, seed=seed, num_starts=config.kmeans_starts
            )

    def state(self) -> dict[str, ShardedRows]:
        maps = None if self.accumulated is None else self.accumulated.rows
        memories = {"memory": self.memory, "maps": maps}
        return {name: memory for name, memory in memories.items() if memory is not None}

    # ---------------------------------------------------------------- use

    def predict(self, images: Tensor, classes: Tensor) -> Prediction:
        """O of Eq. 10. ValueError for a class that no source labels: it has no map."""
        column = self._map_column(classes)
        (features,) = self.backbone(images)
        return self.net.prediction(features, column, self.stride)

    def activations(self, images: Tensor, classes: Tensor) -> Tensor:
        """The maps of O, whose channels share a softmax with EPS. ValueError as `predict`."""
        column = self._map_column(classes)
        (features,) = self.backbone(images)
        return self.net.activated(self.net.final(features, self.net.reduce(features)))[:, column]

    def intermediate_activations(self, images: Tensor, classes: Tensor) -> Tensor:
        """The maps of P, as `activations`."""
        column = self._map_column(classes)
        (features,) = self.backbone(images)
        return self.net.cam(features).relu()[:, column]

    def _map_column(self, classes: Tensor) -> Tensor:
        column = torch.from_numpy(self._column).to(classes.device)[classes]
        if bool((column < 0).any()):
            raise ValueError(
                f"class ids {classes[column < 0].tolist()[:8]} have no activation map: no source "
                "labels them; leave them out (validation.exclude)"
            )
        return column

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.net.reduce(*self.backbone(images)), dim=1)

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """P, O and the affinity to the class's two busiest prototypes there."""
        (features,) = self.backbone(images)
        class_ids = torch.as_tensor(list(classes), device=features.device)
        column = torch.from_numpy(self._column[list(classes)]).to(features.device)
        return self.net.pictures(features, class_ids, column)

    def summary(self, clock: Clock) -> dict[str, float]:
        count = {"prototypes/count": float(len(self.net.prototypes))}
        return count | memory_figures(self.state(), clock.step)

    def charts(self) -> dict[str, Tensor]:
        charts = {}
        if self.memory is not None:
            filled_C = self.memory.per_class().rows
            charts["memory/rows set per class"] = torch.from_numpy(filled_C).double()
        if len(self.net.prototypes):
            charts["prototypes/rows per prototype"] = self.net.prototypes.cluster_sizes()
        return charts

    def class_vectors(self) -> tuple[Tensor, Tensor]:
        """The prototypes, but the noise that the released code starts from."""
        return self.net.prototypes.found()
