"""k-means against scalar loops, against FAISS, and against itself in other company."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from memseg_dist.memory import kmeans as kmeans_module
from memseg_dist.memory import lloyd as lloyd_module
from memseg_dist.memory.kmeans import kmeans

DIM, K = 16, 4
SIZES = (40, 0, 130, 3, 4, 75, 5, 1)


def blobs(sizes, spread: float, seed: int = 0) -> Tensor:
    """Rows around K centres per problem, `spread` noise widths apart, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for size in sizes:
        centres = torch.randn(K, DIM, generator=generator) * spread
        which = torch.randint(K, (size,), generator=generator)
        parts.append(5 + centres[which] + torch.randn(size, DIM, generator=generator))
    return torch.cat(parts)


@pytest.mark.parametrize("engine", ["batched", "faiss"])
def test_products_are_fp32s_whatever_the_run_has_chosen(monkeypatch, engine):
    """Rows that are equal but for TF32's rounding would be told apart."""
    matmul, seen = torch.backends.cuda.matmul, []
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    distances = lloyd_module.Problems.distances

    def watched(*arguments):
        seen.append(matmul.allow_tf32)
        return distances(*arguments)

    monkeypatch.setattr(lloyd_module.Problems, "distances", watched)
    kmeans(blobs((40,), 3.0), [40], K, seeds=[0], engine=engine)
    after, matmul.allow_tf32 = matmul.allow_tf32, before
    assert seen and not any(seen)
    assert after


def lloyd_by_loops(rows: Tensor, start: Tensor, max_iterations: int = 300) -> Tensor:
    """Until the assignment repeats; an empty cluster takes the row farthest from its centroid."""
    rows, centroids, last = rows.double(), start.double().clone(), None
    for _ in range(max_iterations):
        distances = (rows[:, None] - centroids).square().sum(-1)
        which = distances.argmin(1)
        if last is not None and torch.equal(which, last):
            break
        last, farthest = which, distances.amin(1).sort(descending=True, stable=True).indices
        num_empty = 0
        for k in range(len(centroids)):
            if (which == k).any():
                centroids[k] = rows[which == k].mean(0)
            else:
                centroids[k] = rows[farthest[num_empty]]
                num_empty += 1
    return centroids


def objective(rows: Tensor, centroids: Tensor) -> float:
    return (rows[:, None].double() - centroids.double()).square().sum(-1).amin(1).sum().item()


def faiss_kmeans(rows: Tensor, num_clusters: int, num_starts: int = 1, start: Tensor | None = None):
    trainer = faiss.Kmeans(
        rows.shape[1], num_clusters, niter=300, nredo=num_starts, seed=1,
        min_points_per_centroid=1, max_points_per_centroid=len(rows),
    )  # fmt: skip
    trainer.train(rows.numpy(), init_centroids=None if start is None else start.numpy())
    return torch.from_numpy(trainer.centroids)


@pytest.mark.parametrize("engine", ["batched", "faiss"])
@pytest.mark.parametrize("spread", [3.0, 0.5])
def test_objective_is_that_of_faiss(engine, spread):
    rows = blobs(SIZES, spread)
    clusters = kmeans(rows, SIZES, K, seeds=range(len(SIZES)), engine=engine, num_starts=20)
    for problem, part in enumerate(rows.split(SIZES)):
        centroids = clusters.centroids[problem][clusters.counts[problem] > 0]
        assert clusters.counts[problem].sum() == len(part)
        if len(part) == 0:
            assert len(centroids) == 0
            continue
        found = clusters.objective[problem].item()
        assert found == pytest.approx(objective(part, centroids), rel=1e-5, abs=1e-4)
        if len(part) > K:
            other = faiss_kmeans(part, K, num_starts=20)
            assert found == pytest.approx(objective(part, other), rel=0.01)


def lloyd_from(rows: Tensor, sizes, start_PKD: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids and iterations of the batched solver from a given start."""
    sizes = np.array(sizes)
    problems = lloyd_module.pad(rows, np.cumsum(sizes) - sizes, sizes)
    centre = problems.centre_BD[:, None]
    moved, iterations = lloyd_module.lloyd(problems, (start_PKD - centre)[:, None], 300, 0.0)
    return moved[:, 0] + centre, iterations[:, 0]


def test_lloyd_equals_scalar_loops():
    sizes = (60, 200, 90)
    rows = blobs(sizes, 1.0)
    start = torch.stack([part[:K] for part in rows.split(sizes)])
    centroids, iterations = lloyd_from(rows, sizes, start)
    for problem, part in enumerate(rows.split(sizes)):
        expected = lloyd_by_loops(part, start[problem]).float()
        torch.testing.assert_close(centroids[problem], expected, rtol=1e-5, atol=1e-5)
        assert 1 < iterations[problem] < 300


def test_a_problem_is_the_same_alone_and_in_company(monkeypatch):
    rows, seeds = blobs(SIZES, 0.5), [7 * p for p in range(len(SIZES))]
    together = kmeans(rows, SIZES, K, seeds=seeds, num_starts=2)
    again = kmeans(rows, SIZES, K, seeds=seeds, num_starts=2)
    for name in ("centroids", "counts", "objective", "iterations"):
        assert torch.equal(getattr(together, name), getattr(again, name))
    monkeypatch.setitem(kmeans_module.CHUNK_BYTES, "cpu", 1)
    apart = kmeans(rows, SIZES, K, seeds=seeds, num_starts=2)
    torch.testing.assert_close(together.centroids, apart.centroids)
    for problem, part in enumerate(rows.split(SIZES)):
        alone = kmeans(part, [len(part)], K, seeds=[seeds[problem]], num_starts=2)
        torch.testing.assert_close(together.centroids[problem], alone.centroids[0])
        assert torch.equal(together.counts[problem], alone.counts[0])


def test_more_starts_are_never_worse():
    rows, seeds = blobs((120, 80), 0.5), [0, 1]
    best = [
        kmeans(rows, (120, 80), K, seeds=seeds, num_starts=count).objective for count in (1, 2, 8)
    ]
    assert (best[1] <= best[0] * (1 + 1e-6)).all() and (best[2] <= best[1] * (1 + 1e-6)).all()
    other = kmeans(rows, (120, 80), K, seeds=[5, 6]).centroids
    assert not torch.equal(other, kmeans(rows, (120, 80), K, seeds=seeds).centroids)


@pytest.mark.parametrize("engine", ["batched", "faiss"])
def test_few_rows_are_their_own_centroids(engine):
    sizes = (3, 0, 2 * K, K)
    rows = blobs(sizes, 1.0)
    clusters = kmeans(rows, sizes, K, seeds=range(4), engine=engine)
    assert clusters.counts[[0, 1, 3]].tolist() == [[1, 1, 1, 0], [0] * K, [1] * K]
    assert torch.equal(clusters.centroids[0, :3], rows[:3])
    assert torch.equal(clusters.centroids[3], rows[-K:])
    assert not clusters.centroids[clusters.counts == 0].any()
    assert clusters.objective[[0, 1, 3]].tolist() == [0, 0, 0]
    assert clusters.objective[2] > 0
    nothing = kmeans(rows[:0], [], K, seeds=[], engine=engine)
    assert nothing.centroids.shape == (0, K, DIM) and nothing.counts.shape == (0, K)


@pytest.mark.parametrize("engine", ["batched", "faiss"])
def test_repeated_rows_fill_as_many_clusters_as_there_are_distinct(engine):
    distinct = blobs((3,), 3.0)
    sizes = (30, 12)
    rows = torch.cat([distinct.repeat(10, 1), distinct[:1].repeat(12, 1)])
    clusters = kmeans(rows, sizes, K, seeds=[0, 1], engine=engine)
    assert clusters.counts.sum(1).tolist() == [30, 12]
    # FAISS splits a cluster of equal rows for an empty one, and leaves the halves 0.1 % apart
    assert clusters.objective.max() < (1e-6 if engine == "batched" else 1e-2)
    for problem, expected in enumerate((distinct, distinct[:1])):
        found = clusters.centroids[problem][clusters.counts[problem] > 0]
        if engine == "batched":
            assert len(found) == len(expected)
        assert torch.cdist(expected, found).amin(1).max() < (1e-4 if engine == "batched" else 0.05)


@pytest.mark.parametrize("engine", ["batched", "faiss"])
def test_one_cluster_is_the_mean(engine):
    sizes = (40, 1, 9)
    rows = blobs(sizes, 1.0)
    clusters = kmeans(rows, sizes, 1, seeds=range(3), engine=engine)
    expected = torch.stack([part.mean(0, keepdim=True) for part in rows.split(sizes)])
    torch.testing.assert_close(clusters.centroids, expected)
    assert clusters.counts.flatten().tolist() == list(sizes)


def empty_start(rows: Tensor) -> Tensor:
    """Two centroids far from every row: empty after the first assignment."""
    return torch.stack([rows[0], rows[1], rows[0] + 1e3, rows[0] - 1e3])


def test_empty_clusters_move_to_the_farthest_rows(monkeypatch):
    rows = torch.cat([blobs((50,), 1.0), blobs((1,), 1.0) + 30, blobs((1,), 1.0) - 40])
    start, calls = empty_start(rows), []
    refill = lloyd_module.refill
    monkeypatch.setattr(lloyd_module, "refill", lambda *a: calls.append(1) or refill(*a))
    centroids, _ = lloyd_from(rows, [52], start[None])
    assert calls
    torch.testing.assert_close(centroids[0, 2:], rows[[51, 50]])  # the farthest first
    expected = lloyd_by_loops(rows, start).float()
    torch.testing.assert_close(centroids[0], expected, rtol=1e-5, atol=1e-4)


def test_both_ways_to_sum_a_cluster_agree():
    rows = torch.randn(3, 20, 5)
    which = torch.randint(K + 1, (3, 2, 20))  # K: no cluster
    for one, other in zip(
        lloyd_module.sums_by_order(rows, which, K), lloyd_module.sums_by_product(rows, which, K)
    ):
        torch.testing.assert_close(one, other)


def test_auto_takes_faiss_for_what_is_too_large_to_hold(monkeypatch):
    monkeypatch.setitem(kmeans_module.FAISS_DISTANCES, "cpu", 100 * K)
    seen, by_faiss = [], kmeans_module._faiss_lloyd
    monkeypatch.setattr(
        kmeans_module, "_faiss_lloyd",
        lambda problems, *a: seen.append(problems.rows_BND.shape[1]) or by_faiss(problems, *a),
    )  # fmt: skip
    kmeans(blobs(SIZES, 1.0), SIZES, K, seeds=range(len(SIZES)))
    assert seen == [130]


def test_half_precision_rows_are_clustered_in_fp32():
    rows = blobs((60,), 1.0).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        clusters = kmeans(rows, [60], K, seeds=[0])
    expected = kmeans(rows.float(), [60], K, seeds=[0])
    assert torch.equal(clusters.centroids, expected.centroids)


def test_errors_name_what_is_wrong():
    rows = blobs((5, 6), 1.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        kmeans(rows, (5, 6), 0, seeds=[0, 1])
    with pytest.raises(ValueError, match="sizes of 2 problems sum to 10"):
        kmeans(rows, (5, 5), K, seeds=[0, 1])
    with pytest.raises(ValueError, match="1 seeds for 2 problems"):
        kmeans(rows, (5, 6), K, seeds=[0])
    for bad in (torch.nan, -torch.inf, 1e30):
        spoilt = rows.clone()
        spoilt[7, 3] = bad
        with pytest.raises(ValueError, match="problem 1: row 2 of its 6 is not finite"):
            kmeans(spoilt, (5, 6), K, seeds=[0, 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    rows, seeds = blobs(SIZES, 3.0), range(len(SIZES))
    expected = kmeans(rows, SIZES, K, seeds=seeds, num_starts=3)
    for engine in ("batched", "faiss"):
        found = kmeans(rows.cuda(), SIZES, K, seeds=seeds, num_starts=3, engine=engine)
        torch.testing.assert_close(found.objective.cpu(), expected.objective, rtol=1e-3, atol=1e-3)


def test_alone_a_problem_is_what_it_is_without_the_others():
    sizes = [130, 0, 97, 75]
    rows = torch.randn(sum(sizes), 16, generator=torch.Generator().manual_seed(0))
    found = kmeans(rows, sizes, 4, seeds=range(4), num_starts=3, alone=True)
    for problem, part in enumerate(rows.split(sizes)):
        one = kmeans(part, [len(part)], 4, seeds=[problem], num_starts=3)
        for name in ("centroids", "counts", "objective"):
            assert torch.equal(getattr(found, name)[problem], getattr(one, name)[0]), name
