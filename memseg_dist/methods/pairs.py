"""What methods share about classes: the columns of a source's classes among all of the label space,
and the (image, label) pairs of a slot, made from host labels alone, so their number costs no sync.

Shape letters: R pairs, C classes of the label space, N of one source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memseg_dist.batch import IGNORE, Batch, onto_device
from memseg_dist.data.source import Source


@dataclass(frozen=True)
class LabelPairs:
    """Pairs in the order of the batch.

    On the host, int64 [R]: `class_ids`, `image_ids` (which image of the slot), `columns` and
    `num_labels` (of the image). On the device, int64 [R]: `image`, `class_id`, `column`.
    """

    class_ids: np.ndarray
    image_ids: np.ndarray
    columns: np.ndarray
    num_labels: np.ndarray
    image: Tensor
    class_id: Tensor
    column: Tensor

    @staticmethod
    def of(batch: Batch, column_C: np.ndarray, device: torch.device) -> LabelPairs:
        """column_C: see `columns_of`. ValueError for a label outside the source's vocabulary."""
        counts = np.array([len(labels) for labels in batch.labels], dtype=np.int64)
        class_ids = np.array([label for labels in batch.labels for label in labels], np.int64)
        columns = column_C[class_ids]
        if (columns < 0).any():
            raise ValueError(
                f"label {class_ids[columns < 0][0]} of a batch of '{batch.source}' is not in the "
                "vocabulary of that source"
            )
        images = np.repeat(np.arange(len(counts)), counts)
        image, class_id, column = onto_device(device, images, class_ids, columns)
        num_labels = np.repeat(counts, counts)
        return LabelPairs(class_ids, images, columns, num_labels, image, class_id, column)

    def __len__(self) -> int:
        return len(self.class_ids)


def columns_of(class_ids_N: np.ndarray | Sequence[int], num_classes: int) -> np.ndarray:
    """int64 [C]: the column of each label-space class among `class_ids`, -1 outside them."""
    column_C = np.full(num_classes, -1, dtype=np.int64)
    column_C[class_ids_N] = np.arange(len(class_ids_N))
    return column_C


def to_columns(masks: Tensor, column_C: Tensor) -> Tensor:
    """The columns of a mask's label-space ids; IGNORE stays, and so becomes what has no column."""
    return torch.where(masks == IGNORE, IGNORE, column_C[masks.clamp_min(0)])


def check_masks_only(sources: Sequence[Source], method: str) -> None:
    """ValueError for a source without masks, of a method that learns from nothing else."""
    for source in sources:
        if source.supervision != "masks":
            raise ValueError(
                f"source {source.name!r} has supervision {source.supervision!r}; {method} learns "
                "from masks alone: use 'masks', or leave the source out"
            )


def check_source(batch: Batch, classes: Mapping[str, object]) -> None:
    """ValueError for a batch of a source that the method was not built with."""
    if batch.source not in classes:
        raise ValueError(f"source '{batch.source}' is not one of {sorted(classes)}")
