"""The demo: does LarvSeg segment classes that it never saw a mask of? Minutes on two CPU cores.

    make demo                              # or: python jobs/demo.py
    python jobs/demo.py --seeds 0 1 2      # the table of docs/results.md

It draws the scenes, pre-trains a backbone on single objects, trains the paper's baseline and
LarvSeg from it through a local Ray cluster with two DeepSpeed workers, and prints both scores.
Every step is a command that you can type yourself; what is already there is not made again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CONSOLE = Console()
METHODS = {"baseline": ["--baseline"], "larvseg": []}
SCORES = {"All": "val/miou_all", "Base": "val/miou_base", "Novel": "val/miou_novel"}


@dataclass(frozen=True)
class Demo:
    """Baseline and LarvSeg on generated scenes."""

    seeds: tuple[int, ...] = (0,)
    """One pair of runs for each."""
    data: Path = Path("data/scenes")
    """Where the scenes are drawn."""
    storage: Path = Path("runs/demo")
    """Where the runs go."""


def main(demo: Demo) -> None:
    started = time.perf_counter()
    backbone = demo.storage / "pretrain_scenes" / "backbone.safetensors"
    if not (demo.data / "val" / "index.parquet").exists():
        run("datasets/scenes.py", "--root", demo.data)
    if not backbone.exists():
        run("jobs/pretrain_scenes.py", "--data", demo.data, "--storage", demo.storage)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in demo.seeds:
        for method, flags in METHODS.items():
            name = f"{method}_scenes_seed{seed}"
            run(
                "jobs/larvseg_scenes.py", *flags, "--data", demo.data, "--backbone", backbone,
                "--storage", demo.storage, "--name", name, "--seed", seed,
            )  # fmt: skip
            scores[method].append(read_scores(demo.storage / name))
    show(scores)
    minutes = (time.perf_counter() - started) / 60
    print(
        f"{minutes:.1f} minutes\n"
        f"pictures   {demo.storage}/larvseg_scenes_seed{demo.seeds[-1]}/panels\n"
        f"figures    {Path(sys.executable).parent}/mlflow ui "
        f"--backend-store-uri sqlite:///{demo.storage.resolve()}/mlflow.db"
    )


def run(script: str, *arguments: object) -> None:
    """One command of the user's, shown before it runs; the demo ends where it fails."""
    command = [script, *map(str, arguments)]
    CONSOLE.rule(f"python {shlex.join(command)}", align="left")
    result = subprocess.run([sys.executable, str(ROOT / script), *command[1:]])
    if result.returncode:
        sys.exit(result.returncode)


def read_scores(directory: Path) -> dict[str, float]:
    """The last evaluation of a run."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if SCORES["Novel"] in line][-1]
    return {name: last[key] for name, key in SCORES.items()}


def show(scores: dict[str, list[dict[str, float]]]) -> None:
    """Mean, and standard deviation over the seeds where there are several."""
    num_seeds = len(scores["baseline"])
    table = Table("mIoU", *SCORES, title=f"Scenes, {num_seeds} seed(s)")
    for method, results in scores.items():
        cells = []
        for name in SCORES:
            values = [result[name] for result in results]
            spread = f" ± {statistics.stdev(values):.1f}" if num_seeds > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        table.add_row(method, *cells)
    CONSOLE.print(table)


if __name__ == "__main__":
    main(tyro.cli(Demo, description=__doc__))
