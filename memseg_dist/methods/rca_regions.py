"""The regions of a batch as host arrays: those of one slot, and those of the whole step.

Shape letters: R (image, label) pairs of a slot, G those of all slots, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memseg_dist.batch import Batch, Clock
from memseg_dist.losses.mixup import MixupPlan
from memseg_dist.memory.regions import image_id


@dataclass(frozen=True)
class GlobalRegions:
    """The regions of a global batch (or of the one slot): [G] each, with their mixing."""

    slot_G: np.ndarray
    class_G: np.ndarray
    weight_G: np.ndarray
    vectors_GD: Tensor
    plan: MixupPlan


@dataclass(frozen=True)
class SlotRegions:
    """The (image, label) pairs of a slot, in batch order, made from host labels alone: [R] each."""

    classes: np.ndarray
    image_of_slot: np.ndarray
    image_ids: np.ndarray
    num_labels: np.ndarray
    image: Tensor
    column: Tensor

    @staticmethod
    def of(batch: Batch, column_C: np.ndarray, device: torch.device) -> SlotRegions:
        counts = np.array([len(labels) for labels in batch.labels], dtype=np.int64)
        classes = np.array([label for labels in batch.labels for label in labels], dtype=np.int64)
        column = column_C[classes]
        if (column < 0).any():
            raise ValueError(
                f"label {classes[column < 0][0]} of a batch of '{batch.source}' is not in the "
                "vocabulary of that source"
            )
        ids = np.array([image_id(key) for key in batch.keys], dtype=np.int64)
        image = np.repeat(np.arange(len(counts)), counts)

        def put(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        return SlotRegions(
            classes, image, ids[image], np.repeat(counts, counts), put(image), put(column)
        )

    def ids(self, batch: Batch, clock: Clock) -> np.ndarray:
        """int64 [R, 5]: slot, class, image id, labels of the image, images of the slot."""
        same = np.ones_like(self.classes)
        return np.stack(
            [
                clock.slot * same,
                self.classes,
                self.image_ids,
                self.num_labels,
                len(batch.labels) * same,
            ],
            axis=1,
        )
