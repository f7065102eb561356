"""RCA: Regional Semantic Contrast and Aggregation for weakly supervised segmentation (CVPR 2022).

Image labels teach a classifier whose activation maps say where a class is. A memory holds what the
region of each class looked like in every image; regions are contrasted with all of it (RSC), and
its prototypes are read into every image's features (RSA).

    L = alpha_1 L_RM-NCE + alpha_2 BCE(GAP(P), y) + BCE(GAP(O), y)                        (Eq. 11)

The baselines are the same class: OAA is `contrast_weight=0, aggregation="off"`; EPS adds
`saliency_weight=1`.

Where the paper is silent or differs from its official code, the decision, and the flag that gives
the other behaviour (`released()` sets them all as the code has them):

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

The mixup partner may be another slot's region, which a rank has not computed yet when slots run one
after another: with several slots the regions are previewed without gradient, exchanged, and each
slot then takes the exact gradient of its own part (one more forward pass of the backbone).

Shape letters: B images of the slot, D channels, N = h w positions, L classes with a map, R
(image, label) pairs of the slot, G those of all slots, P prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from memseg_dist.batch import Batch, Clock, derive_seed
from memseg_dist.losses.mixup import no_mixup, plan_mixup
from memseg_dist.losses.regions import (
    masked_mean,
    multi_label_loss,
    region_masks,
    region_means,
    valid_positions,
)
from memseg_dist.losses.saliency import saliency_loss
from memseg_dist.memory.maps import MapStore, onto_stored_image
from memseg_dist.memory.proposals import Proposals
from memseg_dist.memory.prototypes import Prototypes, cluster_sizes, find_prototypes
from memseg_dist.memory.region_bank import RegionBank
from memseg_dist.memory.regions import Regions
from memseg_dist.memory.rows import Stateful
from memseg_dist.methods.method import LinearLogits, Method
from memseg_dist.methods.rca_config import RING_CAPACITY, RCAConfig
from memseg_dist.methods.rca_regions import GlobalRegions, SlotRegions
from memseg_dist.models.aggregation import LinearAggregation, PrototypeAttention
from memseg_dist.models.batchnorm import record_batchnorm
from memseg_dist.models.cam import Cam


@dataclass(frozen=True)
class TrainingSet:
    """What a training run knows of its data beyond the batches.

    regions: every (class, image) pair of the sources. epoch_steps: steps in which the sources'
    images are seen once. num_steps: steps of the run.
    """

    regions: Regions
    epoch_steps: int
    num_steps: int


class RCA(Method):
    """The classifier, its three losses, its memory and its prototypes.

    backbone: uint8 images, valid -> [B, D, h, w], with `dim` and `stride`. classes: per source, the
    sorted label-space ids of its vocabulary. training: None for a model that only predicts; it has
    prototypes and no memory.
    """

    prototypes: Tensor
    prototype_classes: Tensor
    prototype_sizes: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        config: RCAConfig,
        *,
        classes: Mapping[str, np.ndarray],
        num_classes: int,
        training: TrainingSet | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        self.classes = classes
        self.class_ids = np.unique(np.concatenate(list(classes.values())))
        self._column = np.full(num_classes, -1, dtype=np.int64)
        self._column[self.class_ids] = np.arange(len(self.class_ids))
        wide: int = backbone.dim  # type: ignore[assignment]
        self.stride: int = backbone.stride  # type: ignore[assignment]
        self._source_columns = {
            name: torch.as_tensor(self._column[ids], device=device) for name, ids in classes.items()
        }
        dim = config.reduce_to or wide
        self.reduce = nn.Conv2d(wide, dim, 1) if config.reduce_to else nn.Identity()
        num_maps = len(self.class_ids) + (config.saliency_weight > 0)
        self.cam = Cam(wide, num_maps, config.head, config.head_width)
        self.attention = PrototypeAttention(config.attention_scale, config.attention_temperature)
        self.linear = LinearAggregation(dim) if config.aggregation == "linear" else None
        final_dim = {"attention": wide + dim, "linear": dim, "off": wide}[config.aggregation]
        self.final_cam = Cam(final_dim, num_maps, config.final_head, config.head_width)
        self.project = _projector(dim) if config.projector else nn.Identity()
        self._start_prototypes(dim)
        self.memory: RegionBank | None = None
        self.maps_seen: MapStore | None = None
        self.training_set = training
        self._previewed: GlobalRegions | None = None
        if training is not None:
            self._start_memory(training, dim, seed, device)

    def _start_prototypes(self, dim: int) -> None:
        count = 0
        if self.config.noise and self.config.aggregation != "off":
            count = len(self.class_ids) * (self.config.num_prototypes or RING_CAPACITY)
        classes = torch.from_numpy(self.class_ids).repeat_interleave(count // len(self.class_ids))
        self.register_buffer("prototypes", torch.randn(count, dim))
        self.register_buffer("prototype_classes", classes)
        self.register_buffer("prototype_sizes", torch.zeros(count, dtype=torch.int64))

    def _start_memory(
        self, training: TrainingSet, dim: int, seed: int, device: torch.device | str
    ) -> None:
        config, pairs = self.config, training.regions
        self.warmup_steps = config.warmup_epochs * training.epoch_steps
        self.prototype_steps = config.prototype_steps or training.epoch_steps
        self._seen = Proposals(4, torch.empty(0, dim, device=device))
        if config.contrast_weight > 0 or config.aggregation != "off":
            if config.keying == "ring":
                capacity = config.capacity or RING_CAPACITY
                rows = Regions.of_rings(self.class_ids, capacity, pairs.num_classes)
            else:
                rows = pairs.cut(config.capacity, seed)
            self.memory = RegionBank(
                rows,
                dim,
                momentum=config.momentum,
                keying=config.keying,
                noise=config.noise,
                table=config.memory_table,
                seed=seed,
                device=device,
            )
        if config.map_size:
            if training.num_steps <= training.epoch_steps:
                raise ValueError(
                    f"steps is {training.num_steps}, but an epoch takes {training.epoch_steps}: "
                    "maps are accumulated after the first, so none would be; train longer, or set "
                    "method.map_size 0"
                )
            self.maps_seen = MapStore(
                pairs, config.map_size, table=config.memory_table, device=device
            )

    # ---------------------------------------------------------------- training

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        regions = self._regions(batch)
        features = self.backbone(batch.images, batch.valid)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            low_size = (features.shape[-2], features.shape[-1])
            valid_BN = valid_positions(batch.valid, low_size, self.stride)
            embedded = self.reduce(features)
            intermediate_BLN = self.cam(features).flatten(2)  # P, Eq. 1
            final_BLN = self.final_cam(self._aggregated(features, embedded)).flatten(2)  # Eq. 10
            intermediate_BL = masked_mean(intermediate_BLN, valid_BN)
            final_BL = masked_mean(final_BLN, valid_BN)
            target_BL = self._targets(batch, final_BL)
            losses = self._label_losses(batch, target_BL, intermediate_BL, final_BL)
            if self.config.saliency_weight > 0:
                losses["saliency"] = self._saliency_loss(
                    batch, target_BL, final_BLN.unflatten(2, low_size)
                )

            score_BL = final_BL.sigmoid()
            if self.maps_seen is not None:
                self._propose_maps(batch, regions, final_BLN, valid_BN, score_BL, low_size, clock)
            if self.memory is None:
                return losses
            mask_RN = region_masks(
                intermediate_BLN, valid_BN, regions.image, regions.column, self.config.region_mask
            )
            region_RD = region_means(embedded.flatten(2), mask_RN, regions.image)  # Eq. 2
            if self.config.gate_by == "intermediate":
                score_BL = intermediate_BL
            is_sure_R = score_BL[regions.image, regions.column] > self.config.gate
            self.memory.propose(regions.classes, regions.image_ids, region_RD, is_sure_R, clock)
            if self._contrasts(clock):
                query_RD = region_RD
                if self.config.projector:
                    projected = self.project(embedded).flatten(2)
                    query_RD = region_means(projected, mask_RN, regions.image)
                losses["contrast"] = self._contrast_loss(batch, regions, query_RD, clock)
        return losses

    def _aggregated(self, features: Tensor, embedded: Tensor) -> Tensor:
        """F^ of Eq. 9, [F, F']."""
        if self.config.aggregation == "off":
            return features
        if self.linear is not None:
            return self.linear(embedded, self.prototypes)
        return torch.cat([features, self.attention(embedded, self.prototypes)], dim=1)

    def _targets(self, batch: Batch, final_BL: Tensor) -> Tensor:
        """y: 1 where the image has the label, [B, L]."""
        target_BL = np.zeros((len(batch.labels), len(self.class_ids)), dtype=np.float32)
        for image, labels in enumerate(batch.labels):
            target_BL[image, self._column[list(labels)]] = 1
        target = torch.from_numpy(target_BL).to(final_BL.device, non_blocking=True)
        return target.to(final_BL.dtype)

    def _label_losses(
        self, batch: Batch, target_BL: Tensor, intermediate_BL: Tensor, final_BL: Tensor
    ) -> dict[str, Tensor]:
        """BCE of Eq. 11, over the classes of the batch's source."""
        column = self._source_columns[batch.source]
        counts_B = batch.valid.flatten(1).any(dim=1)
        target_BL = target_BL[:, column]
        final = multi_label_loss(final_BL[:, column], target_BL, counts_B)
        between = multi_label_loss(intermediate_BL[:, column], target_BL, counts_B)
        return {"final": final, "intermediate": self.config.intermediate_weight * between}

    def _saliency_loss(self, batch: Batch, target_BL: Tensor, final_BMhw: Tensor) -> Tensor:
        """EPS on O, whose last channel is the background."""
        if batch.saliency is None:
            raise ValueError(
                f"method.saliency_weight is {self.config.saliency_weight}, but source "
                f"'{batch.source}' has no saliency maps; set its `saliency` folder"
            )
        loss = saliency_loss(
            final_BMhw,
            target_BL.bool(),
            batch.saliency,
            tau=self.config.saliency_overlap,
            foreground_weight=self.config.saliency_foreground,
        )
        return self.config.saliency_weight * loss

    def _contrasts(self, clock: Clock) -> bool:
        """A function of the step alone: the contrast is a collective."""
        return (
            self.memory is not None
            and self.config.contrast_weight > 0
            and clock.step >= self.warmup_steps
        )

    def _contrast_loss(
        self, batch: Batch, regions: SlotRegions, query_RD: Tensor, clock: Clock
    ) -> Tensor:
        """alpha_1 L_RM-NCE (Eq. 4 - 6): the slot's part of it, mean or sum over its images.

        Mixtures of this slot's regions, and those of other slots' that this slot's take part in;
        of the latter only the gradient.
        """
        assert self.memory is not None
        everything = self._previewed
        if everything is None:
            everything = self._global(regions.ids(batch, clock), query_RD.detach(), clock)
        own_R = np.flatnonzero(everything.slot_G == clock.slot)
        own = torch.from_numpy(own_R).to(query_RD.device, non_blocking=True)
        vectors_GD = everything.vectors_GD.index_copy(0, own, query_RD)

        plan = everything.plan
        is_foreign_G = everything.slot_G != clock.slot
        foreign = np.flatnonzero(is_foreign_G & ~is_foreign_G[plan.partner])
        chosen = np.concatenate([own_R, foreign])
        partner = plan.partner[chosen]

        def put(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(query_RD.device, non_blocking=True)

        omega = put(plan.omega[chosen]).to(query_RD.dtype)[:, None]
        mixed = omega * vectors_GD[put(chosen)] + (1 - omega) * vectors_GD[put(partner)]  # Eq. 5
        weight = everything.weight_G[chosen]
        if self.config.mixup:
            nce = self.memory.contrast(
                torch.cat([mixed, mixed]),
                everything.class_G[np.concatenate([chosen, partner])],
                self.config.temperature,
            )
            share = np.stack([weight * plan.omega[chosen], weight * (1 - plan.omega[chosen])])
            loss = (nce.unflatten(0, (2, -1)) * put(share).to(nce.dtype)).sum(dim=0)  # Eq. 6
        else:
            nce = self.memory.contrast(mixed, everything.class_G[chosen], self.config.temperature)
            loss = nce * put(weight).to(nce.dtype)
        mine, others = loss[: len(own_R)].sum(), loss[len(own_R) :].sum()
        return self.config.contrast_weight * (mine + others - others.detach())

    # ---------------------------------------------------------------- the step as a whole

    def previews(self, clock: Clock) -> bool:
        mixes = self.config.mixup and self.config.mixup_scope == "batch"
        return mixes and clock.num_slots > 1 and self._contrasts(clock)

    @torch.no_grad()
    def preview(self, batch: Batch, clock: Clock) -> None:
        """The slot's query vectors, as `forward` will have them."""
        if clock.idle:
            return
        regions = self._regions(batch)
        features = self.backbone(batch.images, batch.valid)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            low_size = (features.shape[-2], features.shape[-1])
            valid_BN = valid_positions(batch.valid, low_size, self.stride)
            mask_RN = region_masks(
                self.cam(features).flatten(2),
                valid_BN,
                regions.image,
                regions.column,
                self.config.region_mask,
            )
            projected = self.project(self.reduce(features)).flatten(2)
            query_RD = region_means(projected, mask_RN, regions.image)
        self._seen.add(regions.ids(batch, clock)[:, 1:], query_RD, clock)

    def exchange(self, clock: Clock) -> None:
        ids, origin, vectors = self._seen.gather()
        self._previewed = self._global(np.concatenate([origin[:, :1], ids], axis=1), vectors, clock)

    def _global(self, ids_G5: np.ndarray, vectors_GD: Tensor, clock: Clock) -> GlobalRegions:
        slot_G, class_G, image_G, labels_G, batch_G = ids_G5.T
        if not self.config.mixup:
            plan = no_mixup(len(slot_G))
        else:
            of_slot = () if self._previews_all(clock) else (clock.slot,)
            plan = plan_mixup(
                class_G,
                image_G,
                beta=self.config.mixup_beta,
                seed=derive_seed(clock.seed, "mixup", clock.step, *of_slot),
                pair=self.config.mixup_pair,
            )
        weight_G = 1 / labels_G
        if self.config.contrast_reduction == "mean":
            weight_G = weight_G / batch_G
        return GlobalRegions(slot_G, class_G, weight_G, vectors_GD, plan)

    def _previews_all(self, clock: Clock) -> bool:
        return self.previews(clock) or clock.num_slots == 1

    def after_step(self, clock: Clock) -> None:
        self._previewed = None
        assert self.training_set is not None
        if self.maps_seen is not None:
            last_epoch = self.training_set.num_steps - self.training_set.epoch_steps
            self.maps_seen.commit(clock, even_below_gate=clock.step >= last_epoch)
        if self.memory is None:
            return
        self.memory.commit(clock)
        done = clock.step + 1
        # not after the last step: the final map would read prototypes that it never trained with
        is_due = done % self.prototype_steps == 0 and done < self.training_set.num_steps
        if is_due and self.config.aggregation != "off":
            seed = derive_seed(clock.seed, "prototypes", clock.step)
            found = find_prototypes(
                self.memory,
                self.config.num_prototypes,
                seed=seed,
                num_starts=self.config.kmeans_starts,
            )
            self.prototypes, self.prototype_classes, self.prototype_sizes = found

    def _propose_maps(
        self,
        batch: Batch,
        regions: SlotRegions,
        final_BLN: Tensor,
        valid_BN: Tensor,
        score_BL: Tensor,
        low_size: tuple[int, int],
        clock: Clock,
    ) -> None:
        """Online accumulation (OAA): ReLU(O_l) over its maximum, after the first epoch."""
        assert self.maps_seen is not None and self.training_set is not None
        if clock.step < self.training_set.epoch_steps:
            return
        with torch.no_grad():
            map_RN = final_BLN[regions.image, regions.column].relu() * valid_BN[regions.image]
            map_RN = map_RN / map_RN.amax(dim=1, keepdim=True).clamp_min(1e-5)
            covered = (low_size[0] * self.stride, low_size[1] * self.stride)
            places = [batch.places[image] for image in regions.image_of_slot]
            stored = onto_stored_image(
                map_RN.unflatten(1, low_size), places, covered, self.maps_seen.size
            )
            gate_R = score_BL[regions.image, regions.column] >= self.config.map_gate
            self.maps_seen.propose(regions.classes, regions.image_ids, stored, gate_R, clock)

    def _regions(self, batch: Batch) -> SlotRegions:
        if batch.source not in self.classes:
            raise ValueError(f"source '{batch.source}' is not one of {sorted(self.classes)}")
        return SlotRegions.of(batch, self._column, batch.images.device)

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Stateful]:
        memories = {"memory": self.memory, "maps": self.maps_seen}
        return {name: memory for name, memory in memories.items() if memory is not None}

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        """The number of prototypes is what the saved model found."""
        for name in ("prototypes", "prototype_classes", "prototype_sizes"):
            if prefix + name in state_dict:
                saved = state_dict[prefix + name]
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def summary(self, clock: Clock) -> dict[str, float]:
        figures = {"prototypes/count": float(len(self.prototypes))}
        if self.memory is not None:
            for name, value in self.memory.summary(clock.step).items():
                figures[f"memory/{name}"] = value
        if self.maps_seen is not None:
            figures["maps/coverage"] = self.maps_seen.coverage()
        return figures

    def charts(self) -> dict[str, Tensor]:
        charts = {}
        if self.memory is not None:
            filled = self.memory.counts()[self.class_ids]
            charts["memory/rows set per class"] = torch.from_numpy(filled).double()
        if len(self.prototypes):
            found = Prototypes(self.prototypes, self.prototype_classes, self.prototype_sizes)
            charts["prototypes/rows per prototype"] = torch.from_numpy(cluster_sizes(found))
        return charts

    # ---------------------------------------------------------------- use

    def predict(self, images: Tensor, classes: Tensor) -> LinearLogits:
        """O of Eq. 10. ValueError for a class that no source labels: it has no map."""
        column = torch.from_numpy(self._column).to(classes.device)[classes]
        if bool((column < 0).any()):
            raise ValueError(
                f"class ids {classes[column < 0].tolist()[:8]} have no activation map: no source "
                "labels them; leave them out (validation.exclude)"
            )
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            aggregated = self._aggregated(features, self.reduce(features))
            return LinearLogits(*self.final_cam.linear_form(aggregated, column))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.normalize(self.reduce(features.float()), dim=1)

    @torch.no_grad()
    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """P and O over their maxima; the affinity S (Eq. 7) to the class's two busiest prototypes
        there.
        """
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            return self._maps(features.float(), classes)

    def _maps(self, features: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        embedded = self.reduce(features)
        column = torch.from_numpy(self._column[list(classes)]).to(features.device)
        rows = torch.arange(len(features), device=features.device)
        final = self.final_cam(self._aggregated(features, embedded))[rows, column]
        shown = {"P": _over_maximum(self.cam(features)[rows, column]), "O": _over_maximum(final)}
        if self.config.aggregation == "attention" and len(self.prototypes):
            affinity_BPhw = self.attention.affinity(embedded, self.prototypes)
            class_ids = torch.as_tensor(list(classes), device=features.device)
            is_own_BP = self.prototype_classes == class_ids[:, None]
            affinity_BPhw = affinity_BPhw * is_own_BP[:, :, None, None]
            busiest = affinity_BPhw.sum(dim=(2, 3)).argsort(dim=1, descending=True)
            for number in range(min(2, busiest.shape[1])):
                one = affinity_BPhw[rows, busiest[:, number]]
                shown[f"prototype {number + 1}"] = _over_maximum(one)
        return shown


def _projector(dim: int) -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(dim, dim, 3, padding=1),
        nn.BatchNorm2d(dim),
        nn.ReLU(inplace=True),
        nn.Conv2d(dim, dim, 3, padding=1),
    )
    return record_batchnorm(layers)


def _over_maximum(map_Bhw: Tensor) -> Tensor:
    map_Bhw = map_Bhw.relu()
    return map_Bhw / map_Bhw.amax(dim=(1, 2), keepdim=True).clamp_min(1e-5)
