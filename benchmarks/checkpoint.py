"""How long a checkpoint holds up training: waited for, and written while steps go on.

python benchmarks/checkpoint.py                     # 400 MB, about a minute
python benchmarks/checkpoint.py --megabytes 2000 --directory /mnt/runs
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch

from memseg_dist.config import RunConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.train.engine import EngineState
from memseg_dist.train.saver import Saver

LABELS = LabelSpace.union({"images": Vocabulary((Category("n1", "cat"),))})


class Weights:
    """As much of an engine as a checkpoint needs: half of it weights, half momentum."""

    def __init__(self, megabytes: int) -> None:
        count = max(megabytes * 1_000_000 // (2 * 4 * 10_000_000), 1)
        self.tensors = {str(n): torch.randn(10_000_000) for n in range(count)}

    def state(self) -> EngineState:
        copies = [
            {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors.items()}
            for _ in range(2)
        ]
        return EngineState(*copies)


def step() -> None:
    """Stands for a training step of some 50 ms on one core."""
    matrix = torch.ones(700, 700)
    for _ in range(10):
        matrix = matrix @ matrix / 700


def longest_step(saver: Saver) -> tuple[float, int, float]:
    """Of the steps until a checkpoint is whole: the longest, their number, all their time."""
    begun, times, path = time.perf_counter(), [], None
    while path is None:
        started = time.perf_counter()
        step()
        path = saver.settle()
        times.append(time.perf_counter() - started)
    return max(times), len(times), time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", help="where to write; by default a temporary directory")
    options = parser.parse_args()
    sources = (Source("images", "/nowhere", "labels"),)
    config = RunConfig(name="run", storage="/nowhere", sources=sources, method=ClassifyConfig())
    engine = Weights(options.megabytes)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        saver = Saver(directory, config, LABELS, {}, keep=1)
        started = time.perf_counter()
        for _ in range(20):
            step()
        print(f"a step without a checkpoint     {(time.perf_counter() - started) / 20:.3f} s")
        for number in range(options.repeats):
            started = time.perf_counter()
            saver.start(2 * number, engine, {})
            saver.settle(wait=True)
            print(f"waited for                      {time.perf_counter() - started:.3f} s stall")
            started = time.perf_counter()
            saver.start(2 * number + 1, engine, {})
            stall = time.perf_counter() - started
            longest, count, whole = longest_step(saver)
            print(
                f"in the background               {stall:.3f} s stall, then {count} steps of at "
                f"most {longest:.3f} s until it was whole after {whole:.1f} s"
            )


if __name__ == "__main__":
    main()
