"""LarvSeg on real pictures: baseline, LarvSeg, LarvSeg with shuffled weak labels; equal budgets.

    python benchmarks/study_folder.py --shards SHARDS --seeds 0 1 2 --storage runs/study_folder

SHARDS holds coco80/{train,train_labels,train_labels_shuffled,val}, i21k_like and
i21k_like_shuffled, made by the commands in docs/results.md. Masks of 56 classes, image labels of
all; 24 classes are novel. The backbone is pre-trained once, from scratch, on the true image labels.
What is done is kept.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from memseg_dist.tools.study import print_scores, read_scores, run

ROOT = Path(__file__).resolve().parents[1]
NET = """
    --{0}backbone.name resnet18 --{0}backbone.output-stride 8 --{0}backbone.drop-path 0
    --{0}backbone.options channels [32,64,96,128]
    --launch.launcher local --launch.workers 2 --{0}loader.processes 1 --{0}every.log 25"""
MILD = "--{0}sources.{1}.augment.scale-range 0.75 1.5 --{0}sources.{1}.augment.no-photometric"
"""Flips and mild scaling: budgets of minutes leave no time to learn more invariances."""
PRETRAIN = """
    --crop 96 --train.steps 1500 --train.optimizer.lr 2e-3 --train.optimizer.warmup-steps 50
    --train.every.checkpoint 750 --train.sources.0.batch-per-slot 16"""
TRAIN = """
    --crop 128 --steps 300 --optimizer.kind adamw --optimizer.lr 1e-3
    --optimizer.weight-decay 0.01 --optimizer.warmup-steps 30 --optimizer.clip-norm 5
    --method.cls-weight 0.4 --method.aux-weight 0.4 --method.top-k 10 --method.warm-up 5
    --method.distance-threshold 1 --method.seg-denominator valid
    --sources.0.slots 2 --sources.1.slots 1 --sources.2.slots 1
    --sources.0.batch-per-slot 4 --sources.1.batch-per-slot 4 --sources.2.batch-per-slot 4
    --validation.mode whole --every.evaluate 300 --every.checkpoint 300"""


def flags(prefix: str, own: str, *sources: int) -> list[str]:
    """prefix: of the stage's flags."""
    mild = " ".join(MILD.format(prefix, source) for source in sources)
    return shlex.split(f"{NET.format(prefix)} {own} {mild}")


@dataclass(frozen=True)
class Study:
    """Three variants on real pictures."""

    shards: Path
    """Folder of the shards."""
    storage: Path = Path("runs/study_folder")
    """Where the runs go."""
    seeds: tuple[int, ...] = (0, 1, 2)


def main(study: Study) -> None:
    coco, objects = study.shards / "coco80", study.shards / "i21k_like"
    weak = [coco / "train_labels", objects]
    shuffled = [coco / "train_labels_shuffled", study.shards / "i21k_like_shuffled"]
    backbone = study.storage / "pretrain" / "backbone.safetensors"
    if not backbone.exists():
        pretrain = flags("train.", PRETRAIN, 0)
        where = ["--storage", study.storage, "--name", "pretrain"]
        run(ROOT, "jobs/pretrain_folder.py", *pretrain, "--labels", objects, *where)
    novel = json.loads((coco / "val" / "groups.json").read_text())["novel"]
    variants = {
        "baseline": ["--baseline", "--labels", *weak],
        "larvseg": ["--labels", *weak],
        "larvseg, shuffled labels": ["--labels", *shuffled],
    }
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for seed in study.seeds:
        for number, (variant, options) in enumerate(variants.items()):
            name = f"variant{number}_seed{seed}"
            run(
                ROOT, "jobs/larvseg_folder.py", *flags("", TRAIN, 0, 1, 2), *options,
                "--masks", coco / "train", "--val", coco / "val", "--novel", *novel,
                "--backbone.pretrained", backbone,
                "--storage", study.storage, "--name", name, "--seed", seed,
            )  # fmt: skip
            scores[variant].append(read_scores(study.storage / name))
            print_scores(f"Real pictures, seeds up to {seed}", scores)


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
