"""Lloyd's iteration and its start on many k-means problems side by side, in plain torch.

Problems of a chunk lie padded beside each other, about their means. Squared distances are
|x|^2 - 2 x.c + |c|^2 in fp32; below 1e-6 |x|^2 they are rounding: such a row counts as equal to its
centroid when starts are drawn and centroids moved. No loop over problems, no atomics.

Shape letters: B problems, N rows of the longest, D channels, K clusters, S starts, T trials per
draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EQUAL = 1e-6
"""Squared distances below this share of the row's squared norm are rounding."""


@dataclass(frozen=True)
class Problems:
    """Rows about their problem's mean, zero where there is none; their squared norms; the means."""

    rows_BND: Tensor
    is_row_BN: Tensor
    norms_BN: Tensor
    centre_BD: Tensor

    def select(self, index: Tensor) -> Problems:
        parts = (self.rows_BND, self.is_row_BN, self.norms_BN, self.centre_BD)
        return Problems(*(part[index] for part in parts))

    def at(self, index_BSX: Tensor) -> Tensor:
        """Rows by their number in the problem: [B, S, X, D]."""
        problem = torch.arange(len(index_BSX), device=index_BSX.device)
        return self.rows_BND[problem[:, None, None], index_BSX]

    def distances(self, points_BSXD: Tensor) -> Tensor:
        """Squared, of each point to each row: [B, S, X, N], 0 without a row."""
        products = torch.bmm(points_BSXD.flatten(1, 2), self.rows_BND.mT)
        distances = products.view(*points_BSXD.shape[:3], -1).mul_(-2)
        distances += points_BSXD.square().sum(-1)[..., None]
        norms = self.norms_BN[:, None, None]
        distances += norms
        distances.masked_fill_(distances < EQUAL * norms, 0)
        return distances.masked_fill_(~self.is_row_BN[:, None, None], 0)

    def nearest(self, centroids_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance to the nearest centroid and which, K without a row: [B, S, N] both."""
        distance, which = self.distances(centroids_BSKD).min(dim=2)
        return distance, which.masked_fill_(~self.is_row_BN[:, None], centroids_BSKD.shape[2])


def pad(rows_ND: Tensor, first_B: np.ndarray, sizes_B: np.ndarray) -> Problems:
    """Problem b has the rows [first[b], first[b] + sizes[b]), at least one."""
    first = torch.from_numpy(first_B).to(rows_ND.device)
    count = torch.from_numpy(sizes_B).to(rows_ND.device)
    position = torch.arange(int(sizes_B.max()), device=rows_ND.device)
    is_row = position < count[:, None]
    rows = rows_ND[(first[:, None] + position).clamp_(max=len(rows_ND) - 1)].float()
    if sizes_B.min() < sizes_B.max():
        rows.masked_fill_(~is_row[..., None], 0)
    centre = rows.sum(1) / count[:, None]
    rows -= centre[:, None]
    if sizes_B.min() < sizes_B.max():
        rows.masked_fill_(~is_row[..., None], 0)
    return Problems(rows, is_row, torch.linalg.vector_norm(rows, dim=-1).square(), centre)


def uniform_draws(seeds: list[int], num_starts: int, num_clusters: int) -> Tensor:
    """Uniform numbers [B, S, K, T], double; those of start s do not depend on S. T is what
    scikit-learn tries."""
    shape = (num_starts, num_clusters, 2 + int(math.log(num_clusters)))
    return torch.from_numpy(np.stack([np.random.default_rng(s).random(shape) for s in seeds]))


def plus_plus(problems: Problems, draws_BSKT: Tensor) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii, SODA 2007): centroids [B, S, K, D].

    Each is a row drawn in proportion to its squared distance from those before it, the best of T
    for the objective; the first uniformly. Any row once all distances are 0.
    """
    num_problems, num_starts, num_clusters, _ = draws_BSKT.shape
    problem_B1 = torch.arange(num_problems, device=draws_BSKT.device)[:, None]
    start_S = torch.arange(num_starts, device=draws_BSKT.device)
    any_row_BSN = problems.is_row_BN[:, None].float().expand(-1, num_starts, -1)
    nearest_BSN, chosen = any_row_BSN, []
    for k in range(num_clusters):
        peak = nearest_BSN.amax(-1, keepdim=True)
        weights = torch.where(peak > 0, nearest_BSN, any_row_BSN)
        # Whole numbers: their sums are exact in any order, so no draw depends on padding.
        cumulated = (weights / torch.where(peak > 0, peak, 1) * 2**31).long().cumsum(-1)
        total = cumulated[..., -1:]
        draws = draws_BSKT[:, :, k, : 1 if k == 0 else None]
        target = (draws * total).long().minimum(total - 1)
        candidates_BSTD = problems.at(torch.searchsorted(cumulated, target, right=True))
        improved_BSTN = problems.distances(candidates_BSTD)
        if k:
            improved_BSTN = improved_BSTN.minimum(nearest_BSN[:, :, None])
        best = (problem_B1, start_S, improved_BSTN.sum(-1).argmin(-1))
        nearest_BSN = improved_BSTN[best]
        chosen.append(candidates_BSTD[best])
    return torch.stack(chosen, dim=2)


def lloyd(
    problems: Problems, centroids_BSKD: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Centroids and the iterations done [B, S]. A start that has converged is frozen, a problem
    whose starts all have is dropped once half of those carried along are such."""
    result, device = centroids_BSKD.clone(), centroids_BSKD.device
    num_problems, num_starts, _, dim = result.shape
    variance_B1 = (problems.norms_BN.sum(1) / problems.is_row_BN.sum(1) / dim)[:, None]
    iterations = torch.zeros(num_problems, num_starts, dtype=torch.int64, device=device)
    alive = torch.arange(num_problems, device=device)
    is_running = torch.ones_like(iterations, dtype=torch.bool)
    for _ in range(max_iterations):
        centroids = result[alive]
        distance_BSN, which_BSN = problems.nearest(centroids)
        sums, counts = sum_clusters(problems.rows_BND, which_BSN, result.shape[2])
        filled = (counts > 0)[..., None]
        moved = torch.where(filled, sums / counts.clamp_min(1)[..., None], centroids)
        if not filled.all():
            moved = refill(problems, moved, counts == 0, distance_BSN)
        moved = torch.where(is_running[..., None, None], moved, centroids)
        shift = (moved - centroids).square().sum((-1, -2))
        result[alive] = moved
        iterations[alive] += is_running
        is_running = is_running & (shift > tolerance * variance_B1)
        going = is_running.any(1).nonzero().squeeze(1)
        if len(going) == 0:
            break
        if 2 * len(going) <= len(alive):
            problems, alive = problems.select(going), alive[going]
            is_running, variance_B1 = is_running[going], variance_B1[going]
    return result, iterations


def refill(
    problems: Problems, centroids_BSKD: Tensor, is_empty_BSK: Tensor, distance_BSN: Tensor
) -> Tensor:
    """The e-th empty centroid moves to the e-th farthest row, the first of equals; it stays where
    it is if that row lies on its centroid."""
    far, index = distance_BSN.sort(dim=-1, descending=True, stable=True)
    turn = (is_empty_BSK.cumsum(-1) - 1).clamp_min_(0)
    moves = is_empty_BSK & (far.gather(-1, turn) > 0)
    return torch.where(moves[..., None], problems.at(index.gather(-1, turn)), centroids_BSKD)


def sum_clusters(rows_BND: Tensor, which_BSN: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Per cluster the sum of its rows [B, S, K, D] and their number [B, S, K]; `which` is K for no
    cluster. Each row is read in order on the CPU, for K times less arithmetic; a product keeps a
    GPU busy also with few and long clusters."""
    by = sums_by_order if rows_BND.device.type == "cpu" else sums_by_product
    return by(rows_BND, which_BSN, num_clusters)


def sums_by_product(
    rows_BND: Tensor, which_BSN: Tensor, num_clusters: int
) -> tuple[Tensor, Tensor]:
    """The product of the rows with a one-hot matrix."""
    cluster_K1 = torch.arange(num_clusters, device=which_BSN.device)[:, None]
    is_mine_BSKN = which_BSN[:, :, None] == cluster_K1
    sums = torch.bmm(is_mine_BSKN.flatten(1, 2).to(rows_BND.dtype), rows_BND)
    return sums.view(*is_mine_BSKN.shape[:3], -1), is_mine_BSKN.sum(-1)


def sums_by_order(rows_BND: Tensor, which_BSN: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Rows are sorted by cluster, each cluster adds up its stretch."""
    num_problems, num_starts, num_rows = which_BSN.shape
    device, shape = which_BSN.device, (num_problems, num_starts, num_clusters + 1)
    start = torch.arange(num_problems * num_starts, device=device).view(num_problems, -1, 1)
    bag = (which_BSN + start * (num_clusters + 1)).flatten()
    counts = torch.bincount(bag, minlength=start.numel() * (num_clusters + 1))
    order = bag.argsort(stable=True)
    problem = order // (num_starts * num_rows)
    row = problem * num_rows + order % num_rows
    flat = rows_BND.flatten(0, 1)
    sums = F.embedding_bag(row, flat, counts.cumsum(0) - counts, mode="sum")
    return sums.view(*shape, -1)[:, :, :-1], counts.view(shape)[:, :, :-1]
