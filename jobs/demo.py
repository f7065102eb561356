"""The demo: does LarvSeg segment classes that it never saw a mask of? Minutes on two CPU cores.

    make demo                              # or: python jobs/demo.py
    python jobs/demo.py --seeds 0 1 2      # the table of docs/results.md

It draws the scenes, pre-trains a backbone on single objects, trains the paper's baseline and
LarvSeg from it through a local Ray cluster with two DeepSpeed workers, and prints both scores.
Every step is a command that you can type yourself; what is already there is not made again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from memseg_dist.tools.study import print_scores, read_scores, run

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"baseline": ["--baseline"], "larvseg": []}


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
        run(ROOT, "datasets/scenes.py", "--root", demo.data)
    if not backbone.exists():
        run(ROOT, "jobs/pretrain_scenes.py", "--data", demo.data, "--storage", demo.storage)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in demo.seeds:
        for method, flags in METHODS.items():
            name = f"{method}_scenes_seed{seed}"
            run(
                ROOT, "jobs/larvseg_scenes.py", *flags, "--data", demo.data, "--backbone", backbone,
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


if __name__ == "__main__":
    main(tyro.cli(Demo, description=__doc__))
