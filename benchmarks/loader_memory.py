"""What the data set index of millions of samples costs a loader in memory and time.

    python benchmarks/loader_memory.py                       # 14 million rows, about 2 minutes
    python benchmarks/loader_memory.py --rows 1000000 --json index.json

A synthetic index is written in row groups (no images), converted to memory-mapped columns, opened,
and the orders of steps from all over two epochs are drawn. Each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memseg_dist.data.index import Index
from memseg_dist.data.order import BlockedOrder, repeat_factors
from memseg_dist.data.schema import INDEX_NAME, arrow_schema, shard_name

NUM_CLASSES = 21_841


def write_index(root: Path, num_rows: int, rows_per_shard: int = 1000) -> None:
    """An index as ImageNet-21K's would be: one label per image, 110 KB per image."""
    names = pa.array([shard_name(number) for number in range(-(-num_rows // rows_per_shard))])
    with pq.ParquetWriter(root / INDEX_NAME, arrow_schema()) as writer:
        for first in range(0, num_rows, 100_000):
            rows = np.arange(first, min(first + 100_000, num_rows))
            size, no_pixels = len(rows), pa.array([], pa.int64())
            offsets = np.arange(size + 1, dtype=np.int32)
            labels = ((rows * 2654435761) % NUM_CLASSES).astype(np.int32)
            columns: dict[str, Any] = {
                "key": pc.binary_join_element_wise(
                    pa.array(labels).cast("string"), pa.array(rows).cast("string"), "_"
                ),
                "shard": names.take(pa.array(rows // rows_per_shard)),
                "image_offset": rows % rows_per_shard * 110_592 + 512,
                "image_size": np.full(size, 110_000),
                "image_format": pa.repeat("jpg", size),
                "mask_offset": np.zeros(size, np.int64),
                "mask_size": np.zeros(size, np.int64),
                "width": np.full(size, 500, np.int32),
                "height": np.full(size, 375, np.int32),
                "labels": pa.ListArray.from_arrays(offsets, labels),
                "pixels": pa.ListArray.from_arrays(np.zeros(size + 1, np.int32), no_pixels),
            }
            writer.write_table(pa.table(columns, schema=arrow_schema()))


def resident() -> tuple[int, int]:
    """(bytes of this process's own memory, bytes with the mapped file pages it touched)."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared, memory.rss


def measure(root: Path, cache: Path) -> dict[str, float]:
    """Open the index, draw 400 steps from all over two epochs and read their rows."""
    own, total = resident()
    start = time.perf_counter()
    index = Index.open(root, cache)
    seconds_open = time.perf_counter() - start
    seconds_step = draw_steps(index, BlockedOrder(index.shard_sizes, seed=0))
    own_after, total_after = resident()
    repeats = repeat_factors(index, np.arange(index.max_label + 1), 1e-4)
    draw_steps(index, BlockedOrder(index.shard_sizes, 0, repeats=repeats))
    own_balanced, _ = resident()
    return {
        "rows": len(index),
        "seconds_open": round(seconds_open, 2),
        "milliseconds_per_random_step": round(1000 * seconds_step, 3),
        "own_memory_growth_mib": round((own_after - own) / 2**20, 1),
        "own_memory_growth_class_balanced_mib": round((own_balanced - own) / 2**20, 1),
        "memory_growth_with_mapped_pages_mib": round((total_after - total) / 2**20, 1),
    }


def draw_steps(index: Index, order: BlockedOrder) -> float:
    """Seconds per step of 16 samples at a random place of the order."""
    start = time.perf_counter()
    steps = np.linspace(0, 2 * len(index) / 16, 400).astype(int)
    draws = [d for step in steps for slot in range(4) for d in order.slot_samples(step, slot, 4, 4)]
    seconds = time.perf_counter() - start
    for draw in draws:
        index.row(draw.row)
    return seconds / len(steps)


def in_a_process(root: Path, cache: Path) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (root, cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=14_000_000)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / "data", Path(folder) / "cache"
        root.mkdir()
        write_index(root, options.rows)
        figures = {
            "parquet_mib": round((root / INDEX_NAME).stat().st_size / 2**20, 1),
            "first_open": in_a_process(root, cache),
            "later_open": in_a_process(root, cache),
        }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
