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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
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
    prepare_scenes(demo.data)
    prepare_backbone(backbone, demo.data)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in demo.seeds:
        for method, flags in METHODS.items():
            name = f"{method}_scenes_seed{seed}"
            run(
                "jobs/larvseg_scenes.py", *flags, "--data", demo.data, "--backbone", backbone,
                "--storage", demo.storage, "--name", name, "--seed", seed,
            )  # fmt: skip
            scores[method].append(read_scores(demo.storage / name))
    print_scores(f"Scenes, {len(demo.seeds)} seed(s)", scores)
    minutes = (time.perf_counter() - started) / 60
    print(
        f"{minutes:.1f} minutes\n"
        f"pictures   {demo.storage}/larvseg_scenes_seed{demo.seeds[-1]}/panels\n"
        f"figures    {Path(sys.executable).parent}/mlflow ui "
        f"--backend-store-uri sqlite:///{demo.storage.resolve()}/mlflow.db"
    )


def run(script: str, *arguments: object) -> None:
    """`python script arguments`, shown first; exits where it fails."""
    command = [script, *map(str, arguments)]
    Console().rule(f"python {shlex.join(command)}", align="left")
    result = subprocess.run([sys.executable, str(ROOT / script), *command[1:]])
    if result.returncode:
        sys.exit(result.returncode)


def prepare_scenes(data: Path, *options: object) -> None:
    """Scenes, drawn with these options where they are not there yet."""
    if not (data / "val" / "index.parquet").exists():
        run("datasets/scenes.py", "--root", data, *options)


def prepare_backbone(backbone: Path, scenes: Path = Path("data/scenes")) -> None:
    """That of all runs on scenes, trained on `scenes` where it is not there yet."""
    if not backbone.exists():
        prepare_scenes(scenes)
        storage = backbone.parents[1]
        run("jobs/pretrain_scenes.py", "--data", scenes, "--storage", storage)


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
        columns = [[run[name] for run in runs] for name in SCORES]
        spreads = [f" ± {statistics.stdev(own):.2f}" if len(own) > 1 else "" for own in columns]
        cells = [f"{statistics.mean(own):.2f}{spread}" for own, spread in zip(columns, spreads)]
        table.add_row(variant, str(len(runs)), *cells)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Demo, description=__doc__))
