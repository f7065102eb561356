"""Which classes compete where, and which of them an image shows.

Shape letters: B images, K classes of the label space, T of them with masks (trained), F of these
without the background, N of one source.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from memseg_dist.batch import Batch, onto_device
from memseg_dist.data.source import Source
from memseg_dist.methods.pairs import columns_of


class ClassTable:
    """On the host: trained [T] and foreground [F], label-space ids; in_trained_K and
    in_foreground_K, the columns of the label space's classes among them, -1 outside of them.

    Of one source by name, on the device: ids (label-space ids [N]); column [K] (of N, -1 outside
    of them); in_trained [N] (column of T); in_foreground (columns of F that it can name). share: by
    what a slot can learn from ("masks", "labels", "unlabelled"), all slots over those.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        classes: Mapping[str, np.ndarray],
        num_classes: int,
        background: int | None,
        device: torch.device | str,
    ) -> None:
        labelled = [classes[name] for name, s in sources.items() if s.supervision == "masks"]
        trained_T = np.unique(np.concatenate(labelled))
        foreground_F = trained_T[trained_T != (-1 if background is None else background)]
        self.trained, self.foreground = map(torch.from_numpy, (trained_T, foreground_F))
        self.in_trained_K = columns_of(trained_T, num_classes)
        self.in_foreground_K = columns_of(foreground_F, num_classes)
        self.ids, self.column, self.in_trained, self.in_foreground = {}, {}, {}, {}
        for name, ids_N in classes.items():
            named = self.in_foreground_K[ids_N]
            found = columns_of(ids_N, num_classes), self.in_trained_K[ids_N], named[named >= 0]
            (
                self.ids[name],
                self.column[name],
                self.in_trained[name],
                self.in_foreground[name],
            ) = onto_device(device, ids_N, *found)
        self.share = shares(sources)

    def named(self, batch: Batch) -> Tensor:
        """bool [B, F]: the foreground classes that the labels of the images name."""
        is_named_BF = np.zeros((len(batch.labels), len(self.foreground)), dtype=bool)
        for row, labels in zip(is_named_BF, batch.labels, strict=True):
            columns = self.in_foreground_K[np.array(labels, dtype=np.int64)]
            row[columns[columns >= 0]] = True
        return onto_device(batch.images.device, is_named_BF)[0]


def shares(sources: Mapping[str, Source]) -> dict[str, float]:
    """What a slot's loss is scaled by so that the mean over all slots is the mean over its kind."""
    slots = {"masks": 0, "labels": 0, "unlabelled": 0}
    for source in sources.values():
        if source.supervision != "none":
            slots[source.supervision] += source.slots
        if source.supervision != "masks":
            slots["unlabelled"] += source.slots
    total = sum(source.slots for source in sources.values())
    return {kind: total / count for kind, count in slots.items() if count}
