"""RCA's contrast with every row of the memory: time and bytes of one slot, forward and backward.

    python benchmarks/contrast.py [--quick] [--json FILE]

12 mixtures of two regions a slot and worker, D = 512. Ours: queries travel, rows stay, W gloo
ranks. "gather": every rank fetches all rows, then computes alone. "naive": one rank, the public
code's way, one region after another, the whole memory normalised again for each. "limit": one read
of a rank's rows. Bytes are what a rank sends in ring algorithms, counted at the collectives. Below,
the memory plan for sizes that no machine here can hold.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

import measure
import numpy as np
import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from memseg_dist import dist
from memseg_dist.memory.contrast import Contrast
from memseg_dist.memory.layouts import Regions
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Momentum

SIZES = {"VOC 2012": (20, 15_555), "COCO 2014": (80, 240_000)}
PLANNED = {"COCO 2014": (80, 240_000, 8), "ImageNet-21K": (21_841, 14_000_000, 64)}
DIM, NUM_REGIONS, TEMPERATURE = 512, 12, 0.07


def filled_bank(num_classes: int, num_rows: int) -> ShardedRows:
    """Every row set, without going through the proposals."""
    ids = np.arange(num_rows, dtype=np.int64)
    regions = Regions.of_pairs(ids % num_classes, ids, num_classes)
    return ShardedRows(regions, Momentum(), DIM, noise_seed=0)


def questions(num_classes: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(dist.rank())
    queries = torch.from_numpy(draw.normal(size=(NUM_REGIONS, DIM))).float()
    classes = draw.integers(0, num_classes, (NUM_REGIONS, 2))
    return queries.requires_grad_(), classes, np.ones(classes.shape)


class Sent:
    """Counts what passes the collectives, as bytes that this rank sends in a ring."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self._gather, self._reduce = dist.all_gather, dist.all_reduce_sum
        dist.all_gather, dist.all_reduce_sum = self.all_gather, self.all_reduce

    def all_gather(self, tensor):
        self.bytes += tensor.numel() * tensor.element_size() * (dist.size() - 1)
        return self._gather(tensor)

    def all_reduce(self, tensor):
        share = 2 * (dist.size() - 1) / dist.size()
        self.bytes += tensor.numel() * tensor.element_size() * share
        return self._reduce(tensor)


def worker(rank: int, world_size: int, form: str, size: tuple[int, int], port: int, out) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    bank = filled_bank(*size)
    contrast = Contrast(bank)
    queries, classes, weights = questions(size[0])
    counts = dist.all_gather(torch.tensor([len(bank.rows)])).flatten().tolist()

    def ours() -> None:
        contrast(queries, classes, weights, TEMPERATURE).sum().backward()

    def gather() -> None:
        everything = dist.all_gather_ragged(bank.rows, counts)
        classes_T = dist.all_gather_ragged(bank.classes, counts)
        _one_by_one(queries, classes, everything, classes_T, normalise_again=False)

    def naive() -> None:
        _one_by_one(queries, classes, bank.rows, bank.classes, normalise_again=True)

    function = {"ours": ours, "gather": gather, "naive": naive}.get(form, bank.rows.sum)
    sent = Sent()
    function()
    num_bytes = sent.bytes
    took = measure.seconds(function, repeats=3)
    slowest = max(dist.all_gather_object(took))
    if rank == 0:
        held = bank.rows.numel() * 4
        out.put({"seconds": slowest, "sent_KB": num_bytes / 1e3, "held_MB": held / 1e6})
    if world_size > 1:
        torch.distributed.destroy_process_group()


def _one_by_one(queries, classes, rows_TD, class_T, *, normalise_again: bool) -> None:
    """Eq. 4 region after region, as autograd sees it."""
    unit_TD = torch.nn.functional.normalize(rows_TD, dim=1)
    total = queries.sum() * 0
    for query, class_id in zip(queries.repeat_interleave(2, dim=0), classes.flatten().tolist()):
        if normalise_again:
            unit_TD = torch.nn.functional.normalize(rows_TD, dim=1)
        score_T = unit_TD @ torch.nn.functional.normalize(query, dim=0) / TEMPERATURE
        is_own_T = class_T == class_id
        negative = torch.logsumexp(score_T[~is_own_T], dim=0)
        total = total + torch.nn.functional.softplus(negative - score_T[is_own_T]).mean()
    total.backward()


def run(form: str, world_size: int, size: tuple[int, int]) -> dict:
    results = mp.get_context("spawn").SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world_size, form, size, port, results)
    mp.start_processes(worker, arguments, nprocs=world_size, start_method="spawn", join=True)
    return results.get()


def plan() -> Table:
    """Bytes that a run of this size holds, from the shapes alone: nothing here was run."""
    table = Table("data set", "rows", "workers", "rows/worker (GB)", "ids/worker, host (GB)",
                  "scores/slot (MB)", title="Memory plan, fp32, D = 512 (arithmetic)")  # fmt: skip
    for name, (_, num_rows, workers) in PLANNED.items():
        row_bytes = DIM * 4 + 4 + 4 + 12 + 8  # vector, length, updates, origin, class
        own = num_rows / workers
        asked = NUM_REGIONS * workers
        scores = min(asked * own, max(2**25, own)) * 4
        table.add_row(name, f"{num_rows:,}", str(workers), f"{own * row_bytes / 1e9:.2f}",
                      f"{num_rows * 16 / 1e9:.2f}", f"{scores / 1e6:.0f}")  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="VOC's size alone")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    table = Table("memory", "form", "workers", "time (ms)", "sent/worker/slot (KB)",
                  "held/worker (MB)", title="Contrast of 12 mixtures per worker")  # fmt: skip
    rows = []
    for name, size in list(SIZES.items())[: 1 if arguments.quick else None]:
        cases = [("ours", w) for w in (1, 2, 4)] + [("gather", 2), ("naive", 1), ("limit", 1)]
        for form, world_size in cases:
            result = run(form, world_size, size)
            rows.append({"memory": name, "form": form, "workers": world_size} | result)
            table.add_row(
                f"{name}, {size[1]:,} rows",
                form,
                str(world_size),
                f"{1e3 * result['seconds']:.1f}",
                f"{result['sent_KB']:,.1f}",
                f"{result['held_MB']:,.0f}",
            )
    Console().print(table, plan(), measure.machine())
    if arguments.json:
        measure.write_json(arguments.json, rows)


if __name__ == "__main__":
    sys.exit(main())
