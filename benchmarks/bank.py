"""Time and bytes of one step of the memory bank: propose, commit, read.

    python benchmarks/bank.py [--json FILE]

Ours (a ring of event means, sharded by class over W gloo ranks) against the paper's bank (every
pixel stored, on every rank, never exchanged) and a plain step of ViT-B/16 (two 320-pixel crops).
Sixteen images a step with four labels each, M = 20, K = 20, D = 768. "read" scores two crops of 400
positions against their eight labels. The limit is the step's vectors through the exchange once.
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
from memseg_dist.batch import Clock
from memseg_dist.memory.layouts import Rings
from memseg_dist.memory.means import ClassMeans
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Overwrite
from memseg_dist.nn.backbone import BackboneConfig, build_backbone

VOCABULARIES = (171, 847, 21_841)
WORLD_SIZES = (1, 2, 4)
CAPACITY, TOP_K, DIM = 20, 20, 768
NUM_SLOTS, EVENTS_PER_SLOT, NUM_POSITIONS, NUM_READ = 8, 8, 800, 8


def sharded(rank: int, world_size: int, num_classes: int, port: int, results) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    bank = ShardedRows(Rings(num_classes, CAPACITY), Overwrite(), DIM)
    means = ClassMeans(bank).means
    draw = np.random.default_rng(rank)
    rows = torch.randn(EVENTS_PER_SLOT, DIM)
    x = torch.randn(NUM_POSITIONS, DIM)
    step = 0

    def write() -> None:
        nonlocal step
        for slot in range(rank, NUM_SLOTS, world_size):
            ids = draw.integers(0, num_classes, EVENTS_PER_SLOT)
            bank.propose(ids, rows, Clock(step, slot, NUM_SLOTS))
        bank.commit(Clock(step))
        step += 1

    index = torch.arange(NUM_READ)
    times = {
        "write_s": measure.seconds(write, repeats=20, warm_up=3),
        "read_s": measure.seconds(lambda: x @ means[index].T, repeats=20, warm_up=3),
    }
    gathered = dist.all_gather_object(times)
    if rank == 0:
        # a ring all-gather hands every rank all events' vectors, then the changed classes' means
        vector = NUM_SLOTS * EVENTS_PER_SLOT * DIM * 4
        sent = 2 * vector * (world_size - 1) // world_size
        held = bank.rows.numel() * bank.rows.element_size() + means.numel() * 4
        slowest = {key: max(one[key] for one in gathered) for key in times}
        results.put(slowest | {"sent_MB": sent / 1e6, "held_MB": held / 1e6})
    if world_size > 1:
        torch.distributed.destroy_process_group()


def run_sharded(world_size: int, num_classes: int) -> dict:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world_size, num_classes, port, results)
    mp.start_processes(sharded, arguments, nprocs=world_size, start_method="spawn", join=True)
    return results.get()


def full_bank(num_classes: int) -> dict:
    """The paper's bank on one rank: [C, M, K, D], one event at a time, scored pixel by pixel."""
    held = num_classes * CAPACITY * TOP_K * DIM * 4
    if held > 8e9:
        return {"held_MB": held / 1e6, "failed": "not run: does not fit"}
    torch.set_num_threads(1)
    bank = torch.nn.functional.normalize(torch.randn(num_classes, CAPACITY, TOP_K, DIM), dim=-1)
    pointer = [0] * num_classes
    draw = np.random.default_rng(0)
    x, rows = torch.randn(NUM_POSITIONS, DIM), torch.randn(TOP_K, DIM)

    def write() -> None:
        for class_id in draw.integers(0, num_classes, NUM_SLOTS * EVENTS_PER_SLOT).tolist():
            bank[class_id, pointer[class_id]] = rows
            pointer[class_id] = (pointer[class_id] + 1) % CAPACITY

    def read() -> None:
        for class_id in range(NUM_READ):
            (x @ bank[class_id].flatten(0, 1).T).mean(dim=1)

    write_s, read_s = measure.seconds(write), measure.seconds(read)
    return {"write_s": write_s, "read_s": read_s, "sent_MB": 0.0, "held_MB": held / 1e6}


def limit(num_classes: int) -> dict:
    """One copy of the step's vectors in memory: what any exchange has to move at the least."""
    vectors = torch.randn(NUM_SLOTS * EVENTS_PER_SLOT, DIM)
    return {"write_s": measure.seconds(vectors.clone, repeats=50)}


def backbone_step(num_classes: int) -> dict:
    torch.set_num_threads(1)
    net = build_backbone(BackboneConfig(image_size=320, drop_path=0))
    images = torch.zeros(2, 3, 320, 320, dtype=torch.uint8)

    def step() -> None:
        net.zero_grad()
        net(images).mean().backward()

    return {"write_s": measure.seconds(step, repeats=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    table = Table("classes", "bank", "write (ms)", "read (ms)", "sent/rank/step (MB)",
                  "held/rank (MB)", title="The bank, one step")  # fmt: skip
    rows = []

    def add(num_classes: int, name: str, result: dict) -> None:
        rows.append({"classes": num_classes, "bank": name} | result)
        keys = {"write_s": 1e3, "read_s": 1e3, "sent_MB": 1, "held_MB": 1}
        shown = [f"{result[k] * scale:.2f}" if k in result else "-" for k, scale in keys.items()]
        table.add_row(f"{num_classes:,}", name, *shown)

    for num_classes in VOCABULARIES:
        for world_size in WORLD_SIZES:
            add(num_classes, f"ours, W = {world_size}", run_sharded(world_size, num_classes))
        add(num_classes, "the paper's, per rank", full_bank(num_classes))
    add(0, "limit: one copy of the vectors", limit(0))
    add(0, "ViT-B/16 step, 2 x 320 px", backbone_step(0))
    Console().print(table, measure.machine())
    if arguments.json:
        measure.write_json(arguments.json, rows)


if __name__ == "__main__":
    sys.exit(main())
