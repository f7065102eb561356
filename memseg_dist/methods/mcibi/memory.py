"""The feature memory M (Eq. 6, 7): one vector per class, moved by the mean of a whole step.

    M_c <- (1 - m_t) M_c + m_t T_c,   T_c = (sum over slots of sum_p w_p r_p) / (sum of sum_p w_p)

A class's first vector is, by `config.first_vector`, the mean of its pixels in the step in which it
first occurs; one random pixel of each slot of that step; or the centre of the largest cluster of
its random pixels, one of each slot of the run's first steps.

Shape letters: B images, K classes, C channels, h x w positions, H x W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Clock, derive_seed
from memseg_dist.memory.kmeans import kmeans
from memseg_dist.memory.layouts import OnePerClass, Rings
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Overwrite, Schedule, WeightedMean, poly
from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.methods.mcibi.statistics import class_sums

NUM_CLUSTERS = 3
NUM_PIXELS = 64
"""Pixels per class that are clustered."""


class FeatureMemory:
    """rows: M, whole on every worker: 150 classes of 512 channels are 0.3 MB. first_pixels: those
    that wait to be clustered, else None.
    """

    def __init__(
        self, config: MCIBIConfig, num_classes: int, dim: int, device: torch.device | str
    ) -> None:
        self.config, self.num_classes = config, num_classes
        self.schedule = momentum_schedule(config)
        rule = WeightedMean(self.schedule)
        self.rows = ShardedRows(OnePerClass(num_classes), rule, dim, table="local", device=device)
        self.first_pixels: ShardedRows | None = None
        if config.first_vector == "cluster":
            rings = Rings(num_classes, NUM_PIXELS)
            self.first_pixels = ShardedRows(rings, Overwrite(), dim, table="local", device=device)

    def propose(self, pixels_BChw: Tensor, target_BHW: Tensor, clock: Clock) -> None:
        """One slot's R and the class of each pixel of its images, or IGNORE."""
        config, classes = self.config, np.arange(self.num_classes)
        rows, is_set = self.rows.rows, self.rows.is_set
        if self._is_collecting(clock):
            assert self.first_pixels is not None
            none_K = torch.zeros_like(is_set)
            pixel_KC, is_there_K = class_sums(
                pixels_BChw, target_BHW, rows, none_K, random_pixel=True
            )
            self.first_pixels.propose(classes, pixel_KC, clock, weight=is_there_K)
            return
        sum_KC, weight_K = class_sums(
            pixels_BChw,
            target_BHW,
            rows,
            is_set,
            weighting=config.weighting,
            random_pixel=config.first_vector == "pixel",
        )
        self.rows.propose(classes, sum_KC, clock, weight=weight_K)

    def commit(self, clock: Clock) -> None:
        """Collective. Waits for the device once in a run, where it clusters."""
        if not self._is_collecting(clock):
            self.rows.commit(clock)
            return
        assert self.first_pixels is not None
        self.first_pixels.commit(clock)
        if clock.step == self.config.first_steps - 1:
            if dist.rank() == 0:  # every rank holds the same rows
                vectors, is_found = self._largest_clusters(self.first_pixels, clock.seed)
                self.rows.propose(np.arange(self.num_classes), vectors, clock, weight=is_found)
            self.rows.commit(clock)

    def _is_collecting(self, clock: Clock) -> bool:
        return self.first_pixels is not None and clock.step < self.config.first_steps

    def _largest_clusters(self, pixels: ShardedRows, seed: int) -> tuple[Tensor, Tensor]:
        """By cosine, of the pixels' mean length: [K, C], and 1 for each class that has one [K]."""
        rows, sizes = pixels.set_rows()
        seeds = [derive_seed(seed, "first vector", c) for c in range(self.num_classes)]
        found = kmeans(F.normalize(rows, dim=1), sizes, NUM_CLUSTERS, seeds=seeds)
        largest_K = found.counts.argmax(dim=1)
        center_KC = found.centroids[torch.arange(self.num_classes), largest_K]
        size_K = torch.tensor(sizes, device=rows.device)
        of_class = torch.arange(self.num_classes, device=rows.device).repeat_interleave(size_K)
        length_K = rows.new_zeros(self.num_classes).index_add_(0, of_class, rows.norm(dim=1))
        length_K = length_K / size_K.clamp_min(1)
        return F.normalize(center_KC, dim=1) * length_K[:, None], (size_K > 0).float()


def momentum_schedule(config: MCIBIConfig) -> Schedule:
    """m_t, the share of the new value: Eq. 7, or constant."""
    if config.momentum_schedule == "poly":
        return poly(config.momentum, config.momentum_power, config.momentum_floor)
    return lambda clock: config.momentum
