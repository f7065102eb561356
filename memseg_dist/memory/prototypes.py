"""K prototypes per class: the centroids of its rows, found by the rank that owns the class.

Shape letters: P prototypes of all classes, D channels, K per class.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import derive_seed
from memseg_dist.memory.kmeans import kmeans
from memseg_dist.memory.region_bank import RegionBank


class Prototypes(NamedTuple):
    """vectors [P, D], the class of each int64 [P], ascending, and the rows it stands for [P]."""

    vectors: Tensor
    classes: Tensor
    sizes: Tensor


def find_prototypes(
    bank: RegionBank, per_class: int | None, *, seed: int, num_starts: int = 1
) -> Prototypes:
    """Cluster each class's set rows into at most `per_class` (None: every row is a prototype).

    A class with fewer rows than that gives each of its rows, one without rows nothing. The same at
    any number of workers to rounding: each class has its own seed. Collective.
    """
    rows, sizes = bank.set_rows()
    owned = torch.tensor(bank.owned, dtype=torch.int64, device=rows.device)
    if per_class is None:
        counts = torch.tensor(sizes, dtype=torch.int64, device=rows.device)  # maybe of no class
        classes = owned.repeat_interleave(counts)
        found = Prototypes(rows, classes, torch.ones_like(classes))
    else:
        seeds = [derive_seed(seed, "prototypes", class_id) for class_id in bank.owned]
        clusters = kmeans(rows, sizes, per_class, seeds=seeds, num_starts=num_starts)
        is_filled = clusters.counts > 0
        found = Prototypes(
            clusters.centroids[is_filled],
            owned[:, None].expand_as(clusters.counts)[is_filled],
            clusters.counts[is_filled],
        )
    if bank.table.kind == "local" or dist.size() == 1:
        return found
    lengths = dist.all_gather(torch.tensor([len(found.vectors)])).flatten().tolist()
    return Prototypes(*(dist.all_gather_ragged(part, lengths) for part in found))


def cluster_sizes(prototypes: Prototypes) -> np.ndarray:
    """float [P]: rows per prototype, within each class the largest first: for a bar chart."""
    classes, sizes = prototypes.classes.cpu().numpy(), prototypes.sizes.cpu().numpy()
    return sizes[np.lexsort((-sizes, classes))].astype(np.float64)
