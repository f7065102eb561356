"""RCA's contrast of mixed regions with the memory (Eq. 4 - 6), over the regions of a whole step.

The mixup partner of a region may belong to another slot, which a rank has not computed yet, for its
slots run one after another. With several slots the regions are therefore previewed without
gradient and exchanged before the step. Each slot then takes the exact gradient of its own part: of
its own mixtures, and of the other slots' mixtures that its regions take part in. The price is one
more forward pass of the backbone.

Shape letters: R (image, label) pairs of a slot, G those of all slots, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from memseg_dist.batch import Batch, Clock, derive_seed, onto_device
from memseg_dist.memory.contrast import Contrast
from memseg_dist.memory.layouts import image_id
from memseg_dist.memory.proposals import Proposals
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.methods.pairs import LabelPairs
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.methods.rca.mixup import MixupPlan, no_mixup, plan_mixup


@dataclass(frozen=True)
class _StepRegions:
    """The regions of a step, or of the one slot: host arrays [G], vectors [G, D], their mixing."""

    slot: np.ndarray
    class_id: np.ndarray
    weight: np.ndarray
    vectors_GD: Tensor
    plan: MixupPlan


def image_ids(batch: Batch, pairs: LabelPairs) -> np.ndarray:
    """int64 [R]: by which number the memory knows the image of each pair."""
    ids = np.array([image_id(key) for key in batch.keys], dtype=np.int64)
    return ids[pairs.image_ids]


class RegionContrast:
    """memory: rows that regions are contrasted with. first_step: of the contrast."""

    def __init__(
        self, config: RCAConfig, memory: ShardedRows, first_step: int, empty_0D: Tensor
    ) -> None:
        self.config, self.first_step = config, first_step
        self._rows = Contrast(memory)
        self._seen = Proposals(4, empty_0D)
        self._previewed: _StepRegions | None = None

    def is_on(self, clock: Clock) -> bool:
        """A function of the step alone, since the contrast is a collective."""
        return self.config.contrast_weight > 0 and clock.step >= self.first_step

    def needs_preview(self, clock: Clock) -> bool:
        """Whether partners are drawn from slots that are not computed yet."""
        mixes = self.config.mixup and self.config.mixup_scope == "batch"
        return mixes and clock.num_slots > 1 and self.is_on(clock)

    def preview(self, batch: Batch, pairs: LabelPairs, query_RD: Tensor, clock: Clock) -> None:
        """One slot's query vectors, as `loss` will get them."""
        self._seen.add(self._identities(batch, pairs), query_RD, clock)

    def exchange(self, clock: Clock) -> None:
        """Show every rank what all slots previewed. Collective."""
        seen = self._seen.gather()
        (order,) = onto_device(seen.rows.device, seen.order)
        self._previewed = self._mixed(seen.origin[:, 0], seen.ids, seen.rows[order], clock)

    def forget(self) -> None:
        """The step is over."""
        self._previewed = None

    def loss(self, batch: Batch, pairs: LabelPairs, query_RD: Tensor, clock: Clock) -> Tensor:
        """alpha_1 L_RM-NCE: the slot's part of it, mean or sum over its images. Collective.

        Of other slots' mixtures that the slot's regions take part in only the gradient is added.
        """
        step = self._previewed
        if step is None:
            slots = np.full(len(pairs), clock.slot)
            step = self._mixed(slots, self._identities(batch, pairs), query_RD.detach(), clock)
        is_own_G, plan = step.slot == clock.slot, step.plan
        own = np.flatnonzero(is_own_G)
        involved = np.flatnonzero(~is_own_G & is_own_G[plan.partner])
        chosen = np.concatenate([own, involved])
        pair = np.stack([chosen, plan.partner[chosen]], axis=1)
        omega = plan.omega[chosen]
        share = np.stack([omega, 1 - omega], axis=1)  # an unmixed region is its own partner

        own_index, pair_index, shares = onto_device(query_RD.device, own, pair, share)
        vectors_GD = step.vectors_GD.index_copy(0, own_index, query_RD)
        mixed = (shares.to(query_RD.dtype)[:, :, None] * vectors_GD[pair_index]).sum(dim=1)  # Eq. 5
        weights = step.weight[chosen][:, None] * share
        loss = self._rows(mixed, step.class_id[pair], weights, self.config.temperature)  # Eq. 4, 6
        mine, others = loss[: len(own)].sum(), loss[len(own) :].sum()
        return self.config.contrast_weight * (mine + others - others.detach())

    def _identities(self, batch: Batch, pairs: LabelPairs) -> np.ndarray:
        """int64 [R, 4]: class, image, labels of the image, images of the slot."""
        num_images = np.full(len(pairs), len(batch.labels))
        columns = [pairs.class_ids, image_ids(batch, pairs), pairs.num_labels, num_images]
        return np.stack(columns, axis=1)

    def _mixed(
        self, slot_G: np.ndarray, ids_G4: np.ndarray, vectors_GD: Tensor, clock: Clock
    ) -> _StepRegions:
        class_G, image_G, num_labels_G, num_images_G = ids_G4.T
        plan = no_mixup(len(slot_G))
        if self.config.mixup:
            is_whole = self.needs_preview(clock) or clock.num_slots == 1
            of_slot = () if is_whole else (clock.slot,)
            seed = derive_seed(clock.seed, "mixup", clock.step, *of_slot)
            pair, beta = self.config.mixup_pair, self.config.mixup_beta
            plan = plan_mixup(class_G, image_G, beta=beta, seed=seed, pair=pair)
        weight_G = 1 / num_labels_G
        if self.config.contrast_reduction == "mean":
            weight_G = weight_G / num_images_G
        return _StepRegions(slot_G, class_G, weight_G, vectors_GD, plan)
