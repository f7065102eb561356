"""K prototypes per class: the centroids of its rows, found by the rank that owns the class.

Shape letters: P prototypes of all classes, D channels, K per class.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from memseg_dist import dist
from memseg_dist.batch import derive_seed
from memseg_dist.memory.kmeans import kmeans
from memseg_dist.memory.rows import ShardedRows


class Found(NamedTuple):
    """vectors [P, D], the class of each int64 [P], ascending, and the rows it stands for [P]."""

    vectors: Tensor
    classes: Tensor
    sizes: Tensor


class Prototypes(nn.Module):
    """What was found last, see `Found`.

    Buffers of the model, so a published model predicts without a memory; how many there are is what
    the saved model found.
    """

    vectors: Tensor
    classes: Tensor
    sizes: Tensor

    def __init__(self, vectors: Tensor, classes: Tensor, sizes: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.register_buffer("classes", classes)
        self.register_buffer("sizes", sizes)

    def __len__(self) -> int:
        return len(self.vectors)

    def update(
        self, memory: ShardedRows, per_class: int | None, *, seed: int, num_starts: int = 1
    ) -> None:
        """Take the prototypes that `find_prototypes` finds in the memory. Collective."""
        found = find_prototypes(memory, per_class, seed=seed, num_starts=num_starts)
        self.vectors, self.classes, self.sizes = found

    def found(self) -> tuple[Tensor, Tensor]:
        """Class ids int64 [n], ascending, and vectors [n, D], on the host, of those with rows."""
        is_found = self.sizes > 0
        return self.classes[is_found].long().cpu(), self.vectors[is_found].cpu()

    def cluster_sizes(self) -> Tensor:
        """float [P]: rows per prototype, within each class the largest first: for a bar chart."""
        classes, sizes = self.classes.cpu().numpy(), self.sizes.cpu().numpy()
        return torch.from_numpy(sizes[np.lexsort((-sizes, classes))].astype(np.float64))

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        for name in ("vectors", "classes", "sizes"):
            if prefix + name in state_dict:
                saved = state_dict[prefix + name]
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def find_prototypes(
    memory: ShardedRows, per_class: int | None, *, seed: int, num_starts: int = 1
) -> Found:
    """Cluster each class's set rows into at most `per_class` (None: every row is a prototype).

    A class with fewer rows than that gives each of its rows, one without rows nothing. Each class
    has its own seed, so the prototypes are the same at any number of workers: on CUDA, where the
    classes of a rank are clustered together, to rounding. Returns vectors, classes and sizes as in
    `Prototypes`. Collective.
    """
    rows, sizes = memory.set_rows()
    owned = torch.tensor(memory.owned, dtype=torch.int64, device=rows.device)
    if per_class is None:
        counts = torch.tensor(sizes, dtype=torch.int64, device=rows.device)  # maybe of no class
        classes = owned.repeat_interleave(counts)
        found = Found(rows, classes, torch.ones_like(classes))
    else:
        seeds = [derive_seed(seed, "prototypes", class_id) for class_id in memory.owned]
        alone = rows.device.type == "cpu"
        clusters = kmeans(rows, sizes, per_class, seeds=seeds, num_starts=num_starts, alone=alone)
        is_filled = clusters.counts > 0
        found = Found(
            clusters.centroids[is_filled],
            owned[:, None].expand_as(clusters.counts)[is_filled],
            clusters.counts[is_filled],
        )
    if memory.table == "local":
        return found
    lengths = dist.all_gather(torch.tensor([len(found.vectors)])).flatten().tolist()
    return Found(*(dist.all_gather_ragged(part, lengths) for part in found))
