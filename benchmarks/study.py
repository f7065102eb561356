"""Comparing runs: many of them side by side, paired by seed.

rows = run_all(train, [(study, "larvseg", seed) for seed in range(5)], file, processes=2)
interval(paired(rows, "larvseg", "baseline", "miou"))       # "+1.20 ± 0.31 *"
"""

from __future__ import annotations

import json
import math
import os
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

Row = dict[str, Any]
STUDENT_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""Two-sided 95 % quantiles by degrees of freedom."""


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation of several; without those that are no number, and how many."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    share = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{statistics.mean(known):.2f}{spread}{share}"


def show(
    rows: Sequence[Row],
    names: Sequence[str],
    columns: Mapping[str, str],
    compared: Mapping[str, Mapping[str, str]],
    title: str,
    paper: str,
) -> None:
    """Two tables of the variants `names`: their scores, and their differences paired by seed.

    columns: heading -> key of the rows; "-" where a variant's rows lack it. compared: variant ->
    what it is compared with, and the difference in the paper, whose setting `paper` names.
    """
    of = {name: [row for row in rows if row["variant"] == name] for name in names}
    scores = Table("variant", "runs", *columns, "s/run", title=title)
    for name, own in of.items():
        cells = [mean_and_spread([r[key] for r in own if key in r]) for key in columns.values()]
        seconds = f"{statistics.mean(row['seconds'] for row in own):.0f}" if own else "-"
        scores.add_row(name, str(len(own)), *cells, seconds)
    note = "Paired differences, mean and 95 % interval; * : excludes 0"
    differences = Table("difference", paper, *columns, title=note)
    for variant, others in compared.items():
        for against, quoted in others.items():
            if variant not in names or against not in names:
                continue
            cells = [interval(paired(rows, variant, against, key)) for key in columns.values()]
            differences.add_row(f"{variant} - {against}", quoted, *cells)
    console = Console(width=160)
    console.print(scores)
    console.print(differences)


def run_all(
    train: Callable[[Any, str, int], Row],
    todo: Sequence[tuple[Any, str, int]],
    file: Path,
    processes: int,
) -> list[Row]:
    """`train(study, variant, seed)` for all of `todo`, each in a process of one thread.

    A row holds "variant", "seed" and figures. Rows are appended to `file` as they come; those that
    it has already are not made again. Returns all rows of the file. A run that fails is raised once
    the others are done.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill cuts the last one short
    file.write_text("".join(whole))
    done = [json.loads(line) for line in whole]
    failures: list[BaseException] = []
    known = {(row["variant"], row["seed"]) for row in done}
    missing = [item for item in todo if item[1:] not in known]
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker)
    with pool:
        futures = [pool.submit(train, *item) for item in missing]
        console = Console(stderr=True)
        for future in track(as_completed(futures), "runs", len(futures), console=console):
            if (failure := future.exception()) is not None:
                failures.append(failure)
                continue
            done.append(future.result())
            with file.open("a") as stream:
                stream.write(json.dumps(done[-1]) + "\n")
    if failures:
        raise failures[0]
    return done


def check_inputs(storage: Path, inputs: Mapping[str, Path | None]) -> None:
    """ValueError where results of other data or weights lie."""
    storage.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: str(path and path.resolve()) for name, path in inputs.items()})
    file = storage / "inputs.json"
    if file.exists() and file.read_text() != text:
        raise ValueError(f"{storage} has results of {file.read_text()}; give --storage")
    file.write_text(text)


def _start_worker() -> None:
    """One thread; and a worker whose study was killed must not go on writing to its runs."""
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def paired(rows: Sequence[Row], variant: str, against: str, figure: str) -> list[float]:
    """Differences of a figure of two variants, seed by seed, where both have it."""
    score = {
        (row["variant"], row["seed"]): row[figure]
        for row in rows
        if not math.isnan(row.get(figure, math.nan))
    }
    seeds = sorted({row["seed"] for row in rows})
    return [
        score[variant, seed] - score[against, seed]
        for seed in seeds
        if (variant, seed) in score and (against, seed) in score
    ]


def interval(differences: Sequence[float]) -> str:
    """Mean and half the width of the 95 % interval; a star where it excludes 0."""
    if len(differences) < 2:
        return f"{differences[0]:+.2f}" if differences else "-"
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    quantile = STUDENT_95.get(len(differences) - 1, 2.262)
    half = quantile * spread / math.sqrt(len(differences))
    return f"{mean:+.2f} ± {half:.2f}{' *' if abs(mean) > half else ''}"
