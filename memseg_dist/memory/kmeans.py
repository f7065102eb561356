"""k-means of many problems at once: the rows of every class, each class by itself.

    clusters = kmeans(rows_ND, sizes_P, 10, seeds=seeds)     # sizes_P sums to N, may hold zeros
    prototypes = clusters.centroids[clusters.counts > 0]

Minimises, per problem, the sum over its rows x of min_k |x - c_k|^2 (Euclidean; nothing is scaled
to unit length). Greedy k-means++ draws the start from the problem's own seed and Lloyd's iteration
improves it, so what a problem is clustered beside changes nothing but rounding. Two engines share
all but the iteration: "batched" iterates a chunk of problems together (`lloyd.py`, any device);
"faiss" runs faiss.Clustering on one problem and start at a time; "auto" takes the first until a
problem has so many distances that the second is faster (`FAISS_DISTANCES`).

Shape letters: P problems, N rows of all of them (in a chunk: of the longest), D channels, K
clusters, S starts, B problems of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from memseg_dist.memory.lloyd import Problems, lloyd, pad, plus_plus, uniform_draws

Engine = Literal["auto", "faiss", "batched"]
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 2 << 30}
"""Memory a chunk may take beside the rows: about the cache's size on the CPU. A larger problem is a
chunk of its own."""
FAISS_DISTANCES = {"cpu": 1 << 22, "cuda": 1 << 31}
"""Distances of one problem, S K N, above which "auto" takes "faiss", that never holds them all. One
core, N x D = 20,000 x 512: 0.35 s against 0.41 s at K = 200; 0.34 s against 0.27 s at 40,000 and
K = 10, and four times slower on 800 problems of 50 rows. On CUDA the bound is memory alone."""


@dataclass(frozen=True)
class Clusters:
    """centroids [P, K, D] fp32, zero where counts is; counts int64 [P, K], the rows nearest to each
    centroid; objective fp32 [P], the sum of squared distances; iterations int64 [P] of the start
    that was kept. All on the device of the rows.
    """

    centroids: Tensor
    counts: Tensor
    objective: Tensor
    iterations: Tensor


@torch.no_grad()
def kmeans(
    rows_ND: Tensor,
    sizes_P: Sequence[int] | np.ndarray,
    num_clusters: int,
    *,
    seeds: Sequence[int] | np.ndarray,
    engine: Engine = "auto",
    max_iterations: int = 300,
    num_starts: int = 1,
    tolerance: float = 1e-4,
    alone: bool = False,
) -> Clusters:
    """Cluster rows [0, sizes[0]), the next sizes[1], ... each into at most `num_clusters`.

    seeds: one number >= 0 per problem. Of `num_starts` starts the best objective is kept; start s
    is the same whatever their number. A problem stops once the squared moves of its centroids sum
    to at most `tolerance` times the mean variance of its channels, as in scikit-learn ("faiss":
    once the objective stands still).

    alone: one problem at a time, so that what it is clustered beside does not even change rounding:
    slower where problems are many and small.

    A problem with at most K rows gets each row as a centroid of its own. A centroid that loses all
    rows moves to the row farthest from its own centroid. With fewer than K distinct rows only as
    many centroids as those are sure to be filled; the others have count 0.

    ValueError if num_clusters, max_iterations or num_starts is below 1, sizes or seeds do not fit,
    or a row is not finite.
    """
    sizes = np.asarray(sizes_P, dtype=np.int64)
    if min(num_clusters, max_iterations, num_starts) < 1:
        raise ValueError(
            "num_clusters, max_iterations and num_starts must be at least 1, got "
            f"{num_clusters}, {max_iterations}, {num_starts}"
        )
    _check(rows_ND, sizes, len(seeds))
    device, first = rows_ND.device, np.cumsum(sizes) - sizes
    found = _rows_as_centroids(rows_ND, sizes, num_clusters)
    kind = "cpu" if device.type == "cpu" else "cuda"
    row_bytes = 12 * (rows_ND.shape[1] + num_starts * num_clusters)
    max_rows = 0 if alone else CHUNK_BYTES[kind] // row_bytes
    by_faiss = np.full(len(sizes), engine == "faiss")
    if engine == "auto":
        by_faiss = sizes * num_starts * num_clusters > FAISS_DISTANCES[kind]
    with torch.autocast(device.type, enabled=False), _without_tf32():
        for chunk in _chunks(sizes, num_clusters, by_faiss, max_rows):
            problems = pad(rows_ND, first[chunk], sizes[chunk])
            at = torch.from_numpy(chunk).to(device)
            draws = uniform_draws([int(seeds[p]) for p in chunk], num_starts, num_clusters)
            centroids = plus_plus(problems, draws.to(device))
            if by_faiss[chunk[0]]:
                centroids, iterations = _faiss_lloyd(problems, centroids, max_iterations)
            else:
                centroids, iterations = lloyd(problems, centroids, max_iterations, tolerance)
            _keep_best(problems, centroids, iterations, found, at)
    return found


@contextmanager
def _without_tf32() -> Iterator[None]:
    """TF32 keeps 10 bits of a product, and `lloyd.EQUAL` takes distances to be fp32's."""
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept


def _chunks(
    sizes: np.ndarray, num_clusters: int, is_alone: np.ndarray, max_rows: int
) -> Iterator[np.ndarray]:
    """Problems with more than K rows, the largest first: at most `max_rows` padded rows together,
    at most half of them padding; or one problem. `is_alone` holds from some size on."""
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > num_clusters]
    while len(order):
        longest = sizes[order[0]]
        similar = int((sizes[order] * 2 >= longest).sum())
        take = 1 if is_alone[order[0]] else max(1, min(similar, max_rows // int(longest)))
        yield order[:take]
        order = order[take:]


def _faiss_lloyd(
    problems: Problems, centroids_BSKD: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """As `lloyd`, one problem and start after the other. FAISS splits a large cluster where one is
    empty, leaving the halves of equal rows 0.1 % apart, and reads the rows from host memory also
    when it searches on a GPU."""
    import faiss

    num_problems, num_starts, num_clusters, dim = centroids_BSKD.shape
    device = centroids_BSKD.device
    result = centroids_BSKD.cpu().numpy().copy()
    iterations = np.zeros((num_problems, num_starts), dtype=np.int64)
    parameters = faiss.ClusteringParameters()
    parameters.niter = max_iterations
    parameters.min_points_per_centroid = 1  # no warning about few rows
    parameters.max_points_per_centroid = 2**31 - 1  # no sampling
    index: Any = faiss.IndexFlatL2(dim)
    if device.type == "cuda" and faiss.get_num_gpus() > 0:
        resources, config = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
        resources.setTempMemory(256 << 20)  # its default is a fixed 1.5 GiB beside the training's
        config.device = torch.cuda.current_device() if device.index is None else device.index
        index = faiss.GpuIndexFlatL2(resources, dim, config)
    for b in range(num_problems):
        rows = problems.rows_BND[b][problems.is_row_BN[b]].cpu().numpy()
        for s in range(num_starts):
            clustering = faiss.Clustering(dim, num_clusters, parameters)
            faiss.copy_array_to_vector(result[b, s].ravel(), clustering.centroids)
            clustering.train(rows, index)
            flat = faiss.vector_to_array(clustering.centroids)
            result[b, s] = flat.reshape(num_clusters, dim)
            iterations[b, s] = clustering.iteration_stats.size()  # type: ignore[attr-defined]
    return torch.from_numpy(result).to(device), torch.from_numpy(iterations).to(device)


def _keep_best(
    problems: Problems, centroids_BSKD: Tensor, iterations_BS: Tensor, found: Clusters, at: Tensor
) -> None:
    """Write the best start of each problem into `found` at its place."""
    num_clusters = centroids_BSKD.shape[2]
    distance_BSN, which_BSN = problems.nearest(centroids_BSKD)
    problem_B = torch.arange(len(at), device=at.device)
    best = (problem_B, distance_BSN.sum(-1).argmin(-1))
    which_BN, centroids_BKD = which_BSN[best], centroids_BSKD[best]
    counts = torch.stack([(which_BN == k).sum(-1) for k in range(num_clusters)], dim=1)
    residual = centroids_BKD[problem_B[:, None], which_BN.clamp_max(num_clusters - 1)]
    residual -= problems.rows_BND
    square_BN = torch.linalg.vector_norm(residual, dim=-1).square() * problems.is_row_BN
    centroids_BKD = (centroids_BKD + problems.centre_BD[:, None]) * (counts > 0)[..., None]
    found.centroids[at], found.counts[at] = centroids_BKD, counts
    found.objective[at] = square_BN.sum(-1)
    found.iterations[at] = iterations_BS[best]


def _rows_as_centroids(rows_ND: Tensor, sizes: np.ndarray, num_clusters: int) -> Clusters:
    """Clusters with the problems of at most K rows in place."""
    device, shape = rows_ND.device, (len(sizes), num_clusters)
    problem = np.repeat(np.arange(len(sizes)), sizes)
    position = np.arange(len(problem)) - (np.cumsum(sizes) - sizes)[problem]
    row = np.flatnonzero(sizes[problem] <= num_clusters)
    index = tuple(torch.from_numpy(part[row]).to(device) for part in (problem, position))
    centroids = torch.zeros(*shape, rows_ND.shape[1], device=device)
    counts = torch.zeros(shape, dtype=torch.int64, device=device)
    centroids[index] = rows_ND[torch.from_numpy(row).to(device)].float()
    counts[index] = 1
    return Clusters(
        centroids, counts, centroids.new_zeros(len(sizes)), counts.new_zeros(len(sizes))
    )


def _check(rows: Tensor, sizes: np.ndarray, num_seeds: int) -> None:
    if sizes.ndim != 1 or (sizes < 0).any() or int(sizes.sum()) != len(rows):
        raise ValueError(
            f"sizes of {len(sizes)} problems sum to {sizes.sum()}, rows are {tuple(rows.shape)}: "
            "give one number >= 0 per problem, together as many as rows"
        )
    if num_seeds != len(sizes):
        raise ValueError(f"{num_seeds} seeds for {len(sizes)} problems: give one per problem")
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)  # no copy of the rows
    bad = (~norms.square().isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        problem = int(np.searchsorted(np.cumsum(sizes), row, side="right"))
        position = row - int(sizes[:problem].sum())
        raise ValueError(
            f"problem {problem}: row {position} of its {sizes[problem]} is not finite, or too "
            "large; drop or repair such rows before clustering"
        )
