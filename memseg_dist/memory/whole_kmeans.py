"""k-means of one set of rows that lies spread over the ranks; no row leaves its rank.

    clusters = distributed_kmeans(rows_local_ND, 100, seed=0)   # a collective; the same everywhere

As `kmeans` of the rows of all ranks in rank order: greedy k-means++ over every row (nothing is
sampled), Lloyd's iteration to the same tolerance, the same moves of empty centroids. FAISS finds
the nearest centroid of each rank's own rows, on its GPU where there is one; sums and counts are
added up over the ranks. A draw is a place on the line of all rows' weights, the farthest row a
choice among all ranks': how the rows are spread changes nothing but rounding.

Shape letters: N rows of this rank, D channels, K clusters, T trials per draw, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.memory.kmeans import Clusters, first_non_finite, flat_index, kmeans
from memseg_dist.memory.lloyd import EQUAL, sum_clusters, uniform_draws, whole_weights

CHUNK_ROWS = 16384


@torch.no_grad()
def distributed_kmeans(
    rows_local_ND: Tensor,
    num_clusters: int,
    *,
    seed: int,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    start_KD: Tensor | None = None,
) -> Clusters:
    """Clusters of all ranks' rows as one problem (P = 1), alike on every rank. Collective.

    rows_local: this rank's, maybe none, of any float type. seed >= 0. start_KD: begin there instead
    of drawing; the same on every rank. Few or repeated rows and `tolerance`: see `kmeans`.

    ValueError, on every rank, if num_clusters or max_iterations is below 1, the ranks' rows differ
    in their channels, the start does not fit, or a row is not finite.
    """
    if min(num_clusters, max_iterations) < 1:
        raise ValueError(
            "num_clusters and max_iterations must be at least 1, got "
            f"{num_clusters}, {max_iterations}"
        )
    dim = rows_local_ND.shape[1]
    if start_KD is not None and tuple(start_KD.shape) != (num_clusters, dim):
        raise ValueError(f"a start {tuple(start_KD.shape)}: it must be {(num_clusters, dim)}")
    sizes = _check_rows(rows_local_ND)
    if sum(sizes) <= num_clusters:
        gathered = dist.all_gather_ragged(rows_local_ND, sizes)
        return kmeans(gathered, [sum(sizes)], num_clusters, seeds=[seed])
    with torch.autocast(rows_local_ND.device.type, enabled=False):
        rows = _SpreadRows(rows_local_ND, sizes)
        if start_KD is None:
            start_KD = rows.plus_plus(seed, num_clusters)
        else:
            start_KD = start_KD.float() - rows.centre_D
        centroids_KD, iterations = _lloyd(rows, start_KD, max_iterations, tolerance)
        return rows.clusters(centroids_KD, iterations)


def _lloyd(
    rows: _SpreadRows, centroids_KD: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    for iterations in range(1, max_iterations + 1):  # noqa: B007
        distance_N, _, sums_KD, counts_K = rows.nearest(centroids_KD)
        means_KD = (sums_KD / counts_K.clamp_min(1)[:, None]).float()
        moved_KD = torch.where(counts_K[:, None] > 0, means_KD, centroids_KD)
        if not counts_K.all():  # counts are exact: every rank takes the same branch
            moved_KD = _refill(rows, moved_KD, counts_K == 0, distance_N)
        shift = (moved_KD - centroids_KD).square().sum()
        centroids_KD = moved_KD
        # agreed on, since ranks that round differently would wait for each other
        if dist.all_reduce_sum((shift <= tolerance * rows.variance).int()) > 0:
            break
    return centroids_KD, iterations


def _refill(
    rows: _SpreadRows, centroids_KD: Tensor, is_empty_K: Tensor, distance_N: Tensor
) -> Tensor:
    """As `lloyd.refill`, among all ranks' rows."""
    far_K, numbers_K = rows.farthest(distance_N, len(centroids_KD))
    turn_K = (is_empty_K.cumsum(0) - 1).clamp_min_(0)
    moves_K = is_empty_K & (far_K[turn_K] > 0)
    return torch.where(moves_K[:, None], rows.at(numbers_K[turn_K]), centroids_KD)


class _SpreadRows:
    """All ranks' rows about their mean, and points about it too. Each method but `chunks` is a
    collective; rows are numbered over all ranks, in rank order.

    centre [D]; norms [N], squared, of this rank's rows; variance: mean over channels.
    """

    def __init__(self, rows_local_ND: Tensor, sizes: list[int]) -> None:
        self.rows_ND, self.first = rows_local_ND, sum(sizes[: dist.rank()])
        self.index, self.index_device = flat_index(rows_local_ND.shape[1], rows_local_ND.device)
        total, dim = sum(sizes), rows_local_ND.shape[1]
        sum_D = rows_local_ND.new_zeros(dim, dtype=torch.float64)
        for begin in range(0, len(rows_local_ND), CHUNK_ROWS):
            sum_D += rows_local_ND[begin : begin + CHUNK_ROWS].sum(0, dtype=torch.float64)
        self.centre_D = (dist.all_reduce_sum(sum_D) / total).float()
        self.norms_N = sum_D.new_zeros(len(rows_local_ND), dtype=torch.float32)
        for part, chunk in self.chunks():
            self.norms_N[part] = torch.linalg.vector_norm(chunk, dim=1).square()
        self.variance = dist.all_reduce_sum(self.norms_N.sum(dtype=torch.float64)) / total / dim

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Where, and fp32 rows about the mean."""
        for begin in range(0, len(self.rows_ND), CHUNK_ROWS):
            part = slice(begin, begin + CHUNK_ROWS)
            yield part, self.rows_ND[part].float() - self.centre_D

    def nearest(self, centroids_KD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's squared distances and clusters [N]; all ranks' sums, fp64 [K, D], and counts,
        int64 [K]."""
        num_clusters, dim = centroids_KD.shape
        distance_N, device = torch.zeros_like(self.norms_N), self.norms_N.device
        which_N = torch.zeros(len(distance_N), dtype=torch.int64, device=device)
        sums_KE = torch.zeros(num_clusters, dim + 1, dtype=torch.float64, device=device)
        self.index.reset()
        self.index.add(centroids_KD.contiguous().to(self.index_device))
        for part, chunk in self.chunks():
            distance, which = self.index.search(chunk.to(self.index_device), 1)
            distance_N[part], which_N[part] = distance[:, 0], which[:, 0]
            sums, counts = sum_clusters(chunk[None], which_N[None, None, part], num_clusters)
            sums_KE += torch.cat([sums[0, 0], counts[0, 0, :, None]], dim=1)
        distance_N.masked_fill_(distance_N < EQUAL * self.norms_N, 0)
        dist.all_reduce_sum(sums_KE)
        return distance_N, which_N, sums_KE[:, :-1], sums_KE[:, -1].long()

    def clusters(self, centroids_KD: Tensor, iterations: int) -> Clusters:
        _, which_N, _, counts_K = self.nearest(centroids_KD)
        objective = self.variance.new_zeros(1)
        for part, chunk in self.chunks():
            residual = chunk - centroids_KD[which_N[part]]
            objective += torch.linalg.vector_norm(residual, dim=1).square().sum(dtype=torch.float64)
        dist.all_reduce_sum(objective)
        centroids_KD = (centroids_KD + self.centre_D) * (counts_K > 0)[:, None]
        done = torch.tensor([iterations], device=counts_K.device)
        return Clusters(centroids_KD[None], counts_K[None], objective.float(), done)

    def draw(self, weights_N: Tensor, draws_T: Tensor) -> Tensor:
        """Numbers of drawn rows, counted over all ranks [T]; any row if all weights are 0."""
        peak = self._peak(weights_N)
        weights_N, peak = (weights_N, peak) if peak > 0 else (torch.ones_like(weights_N), peak + 1)
        cumulated = whole_weights(weights_N, peak).cumsum(0)
        totals_W = dist.all_gather(whole_weights(weights_N, peak).sum()[None]).flatten()
        ends_W = totals_W.cumsum(0)
        target_T = (draws_T * ends_W[-1]).long().minimum(ends_W[-1] - 1)
        target_T = target_T - (ends_W - totals_W)[dist.rank()]
        is_mine = (target_T >= 0) & (target_T < totals_W[dist.rank()])
        local_T = torch.searchsorted(cumulated, target_T, right=True) + self.first
        return dist.all_reduce_sum(torch.where(is_mine, local_T, 0))

    def at(self, numbers_T: Tensor) -> Tensor:
        """The rows of these numbers, about the mean [T, D]."""
        rows = self.centre_D.new_zeros(len(numbers_T), len(self.centre_D))
        local_T = numbers_T - self.first
        is_mine = (local_T >= 0) & (local_T < len(self.rows_ND))
        rows[is_mine] = self.rows_ND[local_T[is_mine]].float() - self.centre_D
        return dist.all_reduce_sum(rows)

    def farthest(self, distance_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Distances, falling, and numbers of the `count` farthest rows, the first of equals."""
        far, order = distance_N.sort(descending=True, stable=True)
        padded, numbers = far.new_zeros(count), order.new_zeros(count)
        padded[: len(far)], numbers[: len(far)] = far[:count], order[:count] + self.first
        far, order = dist.all_gather(padded).flatten().sort(descending=True, stable=True)
        return far[:count], dist.all_gather(numbers).flatten()[order[:count]]

    def plus_plus(self, seed: int, num_clusters: int) -> Tensor:
        """Greedy k-means++ as in `lloyd.plus_plus`: [K, D]."""
        draws_KT = uniform_draws([seed], 1, num_clusters)[0, 0].to(self.centre_D.device)
        nearest_N, chosen = torch.ones_like(self.norms_N), []
        for k in range(num_clusters):
            draws = draws_KT[k, : 1 if k == 0 else None]
            candidates_TD = self.at(self.draw(nearest_N, draws))
            improved_NT = self.norms_N.new_zeros(len(self.norms_N), len(draws))
            for part, chunk in self.chunks():
                improved_NT[part] = _squared_distances(chunk, candidates_TD)
            improved_NT.masked_fill_(improved_NT < EQUAL * self.norms_N[:, None], 0)
            if k:
                improved_NT = improved_NT.minimum(nearest_N[:, None])
            objective_T = dist.all_reduce_sum(improved_NT.sum(0, dtype=torch.float64))
            best = int(objective_T.argmin())
            nearest_N = improved_NT[:, best]
            chosen.append(candidates_TD[best])
        return torch.stack(chosen)

    def _peak(self, weights_N: Tensor) -> Tensor:
        local = torch.cat([weights_N, weights_N.new_zeros(1)]).amax()
        return dist.all_gather(local).amax()


def _squared_distances(rows_ND: Tensor, points_TD: Tensor) -> Tensor:
    """By differences, not by a product: a row's does not depend on the rows beside it."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(rows_ND, points_TD, compute_mode=mode).square()


def _check_rows(rows_local_ND: Tensor) -> list[int]:
    """The number of rows of each rank. Collective, so that all ranks raise or none."""
    bad = first_non_finite(rows_local_ND)
    header = torch.tensor([*rows_local_ND.shape, -1 if bad is None else bad])
    headers = dist.all_gather(header).tolist()
    if len({dim for _, dim, _ in headers}) > 1:
        raise ValueError(f"rows have {[dim for _, dim, _ in headers]} channels on the ranks")
    for rank, (_, _, row) in enumerate(headers):
        if row >= 0:
            raise ValueError(
                f"rank {rank}: row {row} is not finite, or too large; "
                "drop or repair such rows before clustering"
            )
    return [count for count, _, _ in headers]
