"""Seconds and objective of k-means per class: FAISS in a loop, scikit-learn in a loop, ours.

    python benchmarks/kmeans.py [--quick] [--only 80x500x1024] [--minutes 10] [--json FILE]

Every way clusters the same problems into K = 10, on the CPU and on a GPU where there is one. Rows
come from overlapping modes. "read" is what Lloyd's iteration must read at the least, iterations x
rows x channels x 4 bytes, per second of the whole call (start included); the floor is the rate at
which one sum over 1 GiB reads. "objective" is the sum of squared distances over all problems, as a
multiple of the best way's. The ragged case takes block after block of problems until the minutes
are over; the table says how many it took, and nothing is extrapolated.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import faiss
import measure
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memseg_dist.memory.kmeans import Engine, kmeans

NUM_CLUSTERS, SPREAD = 10, 0.25
BLOCK_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
CASES = {"20x500x512": (20, 512), "80x500x1024": (80, 1024), "21841x500x512": (21_841, 512)}
RAGGED = "21841x500x512"
"""Sizes uniform in 1..500; the other cases have 500 rows in every problem."""


@dataclass(frozen=True)
class Options:
    """FAISS in a loop, scikit-learn in a loop and ours: seconds, objective, bytes per second."""

    only: tuple[str, ...] = tuple(CASES)
    """Cases: problems x rows x channels."""
    quick: bool = False
    """The smallest case alone, once."""
    minutes: float = 10
    """For the ragged case, on each device."""
    starts: int = 1
    """Starts per problem, the best is kept."""
    repeats: int = 3
    """Of the cases that are not ragged; the median counts."""
    seed: int = 0
    json: Path | None = None
    """Write the figures there."""


class Found(NamedTuple):
    centroids: Tensor
    """[P, K, D]; inf where there is none."""
    iterations: np.ndarray
    """Of each problem's best start [P]."""


class Way(NamedTuple):
    name: str
    cluster: Callable[[Tensor, np.ndarray, Options], Found]


def in_a_loop(cluster_one: Callable[[np.ndarray, Options, bool], tuple[np.ndarray, int]]):
    """A way from one that clusters a single problem with more rows than K."""

    def cluster(rows: Tensor, sizes: np.ndarray, options: Options) -> Found:
        shape = (len(sizes), NUM_CLUSTERS, rows.shape[1])
        centroids, iterations = np.full(shape, np.inf, np.float32), np.zeros(len(sizes))
        parts = np.split(rows.cpu().numpy(), np.cumsum(sizes)[:-1])
        for problem, part in enumerate(parts):
            if len(part) <= NUM_CLUSTERS:
                centroids[problem, : len(part)] = part
            else:
                centroids[problem], iterations[problem] = cluster_one(part, options, rows.is_cuda)
        return Found(torch.from_numpy(centroids).to(rows.device), iterations)

    return cluster


def faiss_one(rows: np.ndarray, options: Options, on_gpu: bool) -> tuple[np.ndarray, int]:
    trainer = faiss.Kmeans(
        rows.shape[1], NUM_CLUSTERS, niter=100, nredo=options.starts, seed=options.seed + 1,
        min_points_per_centroid=1, max_points_per_centroid=len(rows),
        gpu=on_gpu and min(faiss.get_num_gpus(), 1),
    )  # fmt: skip
    trainer.train(rows)
    return trainer.centroids, len(trainer.obj) // options.starts


def sklearn_one(rows: np.ndarray, options: Options, on_gpu: bool) -> tuple[np.ndarray, int]:
    from sklearn.cluster import KMeans

    found = KMeans(NUM_CLUSTERS, n_init=options.starts, random_state=options.seed).fit(rows)
    return found.cluster_centers_.astype(np.float32), found.n_iter_


def ours(engine: Engine) -> Callable[[Tensor, np.ndarray, Options], Found]:
    def cluster(rows: Tensor, sizes: np.ndarray, options: Options) -> Found:
        found = kmeans(
            rows, sizes, NUM_CLUSTERS, engine=engine, num_starts=options.starts,
            seeds=range(options.seed, options.seed + len(sizes)),
        )  # fmt: skip
        empty = (found.counts == 0)[..., None]
        iterations = found.iterations.cpu().numpy()
        return Found(found.centroids.masked_fill(empty, torch.inf), iterations)

    return cluster


def ways(device: str) -> list[Way]:
    found = [
        Way("faiss.Kmeans, loop", in_a_loop(faiss_one)),
        Way("ours, faiss", ours("faiss")),
        Way("ours, batched", ours("batched")),
    ]
    if device == "cpu":
        import sklearn.cluster  # noqa: F401  before any time is taken

        found.insert(1, Way("scikit-learn, loop", in_a_loop(sklearn_one)))
    return found


def blocks(name: str, device: str, seed: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Rows and sizes of the case's problems, as many at a time as BLOCK_BYTES allow."""
    num_problems, dim = CASES[name]
    draw = np.random.default_rng(seed)
    sizes = np.full(num_problems, 500)
    if name == RAGGED:
        sizes = draw.integers(1, 501, num_problems)
    step = max(1, BLOCK_BYTES[device] // (500 * dim * 4))
    for begin in range(0, num_problems, step):
        part = sizes[begin : begin + step]
        rows = draw.standard_normal((part.sum(), dim), dtype=np.float32)
        modes = draw.standard_normal((len(part) * NUM_CLUSTERS, dim), dtype=np.float32) * SPREAD
        mode = draw.integers(0, NUM_CLUSTERS, len(rows))
        rows += modes[np.repeat(np.arange(len(part)), part) * NUM_CLUSTERS + mode]
        yield torch.from_numpy(rows).to(device), part


def objective(rows: Tensor, sizes: np.ndarray, centroids: Tensor) -> float:
    parts = zip(rows.split(sizes.tolist()), centroids)
    return sum(
        torch.cdist(part, one[one.isfinite().all(1)]).amin(1).square().sum(dtype=torch.float64)
        for part, one in parts
    ).item()


def run_case(name: str, device: str, floor: float, options: Options) -> list[dict]:
    deadline = time.monotonic() + 60 * options.minutes
    repeats = 1 if name == RAGGED or options.quick else options.repeats
    total = {way.name: {"seconds": 0.0, "objective": 0.0, "GiB": 0.0} for way in ways(device)}
    num_problems = num_rows = 0
    for rows, sizes in blocks(name, device, options.seed):
        warm_up = 1 if repeats > 1 or (rows.is_cuda and num_problems == 0) else 0
        for way in ways(device):
            found: list[Found] = []
            one = total[way.name]
            one["seconds"] += measure.seconds(
                lambda cluster=way.cluster, found=found: found.append(
                    cluster(rows, sizes, options)  # noqa: B023
                ),
                repeats=repeats,
                warm_up=warm_up,
            )
            read = float((found[0].iterations * sizes).sum()) * rows.shape[1] * 4
            one["GiB"] += read / 2**30
            one["objective"] += objective(rows, sizes, found[0].centroids)
        num_problems, num_rows = num_problems + len(sizes), num_rows + len(rows)
        if time.monotonic() > deadline:
            break
    best = min(one["objective"] for one in total.values())
    return [
        {
            "case": name, "device": device, "way": way, "problems": num_problems, "rows": num_rows,
            "of_problems": CASES[name][0], "seconds": one["seconds"],
            "objective_over_best": one["objective"] / best,
            "read_GiB_per_s": one["GiB"] / one["seconds"], "floor_GiB_per_s": floor,
        }
        for way, one in total.items()
    ]  # fmt: skip


def read_rate(device: str) -> float:
    """GiB/s of one sum over 1 GiB."""
    values = torch.ones(1 << 28, device=device)
    return 1 / measure.seconds(values.sum, repeats=5)


def main(options: Options) -> None:
    console = Console()
    unknown = sorted(set(options.only) - set(CASES))
    if unknown:
        raise ValueError(f"no cases {unknown}; choose from {list(CASES)}")
    names = list(options.only)[:1] if options.quick else list(options.only)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    records = []
    for device in devices:
        floor = read_rate(device)
        for name in names:
            new = run_case(name, device, floor, options)
            records += new
            title = f"{name} on {device}: {new[0]['problems']:,} of {new[0]['of_problems']:,} " \
                f"problems, {new[0]['rows']:,} rows; floor {floor:.1f} GiB/s"  # fmt: skip
            table = Table("way", "seconds", "objective", "read (GiB/s)", "of floor",
                          title=title)  # fmt: skip
            for one in new:
                rate, relative = one["read_GiB_per_s"], one["objective_over_best"]
                shown = (f"{one['seconds']:.3f}", f"{relative:.4f}", f"{rate:.2f}")
                table.add_row(one["way"], *shown, f"{rate / floor:.1%}")
            console.print(table)
    console.print(measure.machine())
    if options.json:
        measure.write_json(options.json, records)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main(tyro.cli(Options, description=__doc__)))
