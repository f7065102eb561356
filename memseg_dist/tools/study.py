"""Comparing runs: commands one after another, and a table of their scores over the seeds.

run("jobs/larvseg_scenes.py", "--seed", 0, "--name", "larvseg_0")
print_scores("Scenes", {"larvseg": [read_scores(Path("runs/larvseg_0"))]})
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

SCORES = {"All": "val/miou_all", "Base": "val/miou_base", "Novel": "val/miou_novel"}


def run(root: Path, script: str, *arguments: object) -> None:
    """`python script arguments` of the checkout `root`, shown first; exits where it fails."""
    command = [script, *map(str, arguments)]
    Console().rule(f"python {shlex.join(command)}", align="left")
    result = subprocess.run([sys.executable, str(root / script), *command[1:]])
    if result.returncode:
        sys.exit(result.returncode)


def read_scores(directory: Path) -> dict[str, float]:
    """All, Base and Novel mIoU of a run's last evaluation. ValueError if it has none."""
    history = directory / "metrics.jsonl"
    lines = map(json.loads, history.read_text().splitlines())
    evaluations = [line for line in lines if SCORES["Novel"] in line]
    if not evaluations:
        raise ValueError(f"{history} has no evaluation with base and novel classes")
    return {name: evaluations[-1][key] for name, key in SCORES.items()}


def print_scores(title: str, results: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """A row per variant: mean over its runs, and standard deviation where there are several."""
    table = Table("mIoU", "runs", *SCORES, title=title)
    for variant, runs in results.items():
        cells = [_mean_and_spread([run[name] for run in runs]) for name in SCORES]
        table.add_row(variant, str(len(runs)), *cells)
    Console().print(table)


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
