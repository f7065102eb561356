"""What loader processes cost before their first batch, when a job starts them.

    python benchmarks/loader_start.py [--processes 2] [--repeats 3]

A job imports the whole framework. The peer is what `multiprocessing` does: each process that it
starts runs the script of the one that starts it. Ours do not (`data.loader_process`). The limit is
a loader that reads in the worker itself. Each row is the median of fresh jobs of one worker: the
time to its first batch, and of one loader process the CPU time and the memory that it shares with
no other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

import memseg_dist.pipeline  # noqa: F401 - what every job imports
from memseg_dist.data import loader
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader_process import starting_processes
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.tools.miniature import draw_miniature

CLASSES = Vocabulary(tuple(Category(f"toy:{index}", f"toy {index}") for index in range(6)))


def job(root: str, way: str, processes: int) -> None:
    """Prints what its loader cost, as JSON."""
    if way == "peer":
        loader.starting_loader_processes = lambda num_processes: starting_processes()
    source = loader.Source("toy", root, "masks", 1, 2, AugmentConfig(crop=32, resize=(32, 32)))
    batches = loader.TrainLoader(
        [source],
        LabelSpace.union({"toy": CLASSES}),
        seed=0,
        num_processes=0 if way == "limit" else processes,
    )
    started = time.perf_counter()
    next(batches.steps(0, 10))
    figures = {"seconds": time.perf_counter() - started, "cpu": 0.0, "megabytes": 0.0}
    for process in psutil.Process().children(recursive=True):
        if process.name() == "pt_data_worker":
            times = process.cpu_times()
            figures["cpu"] = times.user + times.system
            figures["megabytes"] = process.memory_full_info().uss / 1e6
    print(json.dumps(figures))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    ways = {"peer": "run the script", "ours": "do not", "limit": "none at all"}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as root:
        draw_miniature(Path(root), CLASSES, with_masks=True, size=40)
        for _ in track(range(options.repeats), "jobs"):
            for way in ways:
                command = [sys.executable, __file__, "--job", root, way, str(options.processes)]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[way].append(json.loads(answer.stdout.splitlines()[-1]))
    table = Table(title=f"{options.processes} loader processes, median of {options.repeats} jobs")
    for heading in ("loader processes", "first batch", "CPU of each", "own memory of each"):
        table.add_column(heading)
    for way, name in ways.items():
        seconds, cpu, megabytes = (
            statistics.median(row[key] for row in found[way]) for key in found[way][0]
        )
        table.add_row(name, f"{seconds:.2f} s", f"{cpu:.2f} s", f"{megabytes:.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        job(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
