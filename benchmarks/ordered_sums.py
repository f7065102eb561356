"""Wall time of one step's sum of gradients: slot by slot in their order, and in no order.

    python benchmarks/ordered_sums.py [--json FILE]

25 million weights (a ViT-S) and eight slots, dealt to W gloo ranks of one thread on this machine.
In order is ours (`engine.ordered_sums`, the same bits at any W); the peer is what data-parallel
training does, every rank adding up its own slots and one all-reduce at the end. The limit is that
all-reduce alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import measure
import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn

from memseg_dist import dist
from memseg_dist.train.gradients import GradientSum

WEIGHTS, MATRICES, SLOTS = 25_000_000, 50, 8


def one_rank(rank: int, world_size: int, store: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    parameters = [nn.Parameter(torch.zeros(WEIGHTS // MATRICES)) for _ in range(MATRICES)]
    gradients = [torch.randn_like(parameter) for parameter in parameters]

    def step(sums: GradientSum) -> None:
        for _ in range(SLOTS // world_size):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                # as backward does it: a fresh tensor, or added to the one that is there
                parameter.grad = (
                    gradient.clone() if parameter.grad is None else parameter.grad + gradient
                )
            sums.add_slot()
        sums.finish()
        for parameter in parameters:
            parameter.grad = None

    ordered = GradientSum(parameters, in_order=True)
    unordered = GradientSum(parameters, in_order=False)
    flat = torch.randn(WEIGHTS)
    times = {
        "in order": measure.seconds(lambda: step(ordered), repeats=7),
        "in no order": measure.seconds(lambda: step(unordered), repeats=7),
        "one all-reduce": measure.seconds(lambda: dist.all_reduce_sum(flat), repeats=7),
    }
    if rank == 0:
        results.put(times)
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-sizes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    context = mp.get_context("spawn")
    table = Table("W", "in order (ms)", "in no order (ms)", "one all-reduce (ms)",
                  title="Gradients of one step, copies of backward included")  # fmt: skip
    rows = []
    for world_size in options.world_sizes:
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as directory:
            arguments = (world_size, f"{directory}/store", results)
            mp.start_processes(one_rank, arguments, nprocs=world_size, start_method="spawn")
        times = results.get()
        rows.append({"workers": world_size} | times)
        table.add_row(str(world_size), *(f"{1e3 * time:.0f}" for time in times.values()))
    Console(width=100).print(table)
    if options.json:
        measure.write_json(options.json, rows)


if __name__ == "__main__":
    main()
