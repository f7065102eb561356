"""LarvSeg on real pictures: what image labels, and its memory, are worth for classes without masks.

    python benchmarks/study_larvseg.py --shards SHARDS --weights WEIGHTS --seeds 0 1 2

Masks of 56 classes of COCO, image labels of all its 80 and of the classes of object-centric
pictures; 24 of the 80 are novel. Equal budgets, one core a run. "all the weight": a baseline whose
one weak loss weighs as much as LarvSeg's two. "shuffled": weak labels permuted among the pictures,
which should teach nothing of the novel classes. A difference is given with its 95 % interval
(Student's t over the seeds' differences). What is done already is not done again.

--shards: coco80/{train,train_labels,train_labels_shuffled,val}, i21k_like and i21k_like_shuffled,
made by the commands in docs/results.md; --weights: tf_efficientnet_lite0.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import study as shared
import tyro
from study import Row, run_all
from study_setup import ALONE, LITE0, OPTIMIZER, alone, slug

from memseg_dist.config import RunConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.launch import launch

WEAK_WEIGHT = 0.4
SCORES = {"All": "val/miou_all", "Base": "val/miou_base", "Novel": "val/miou_novel"}
VARIANTS: dict[str, dict] = {
    "baseline": {"attention": "off"},
    "baseline, all the weight": {"attention": "off", "cls_weight": 2 * WEAK_WEIGHT},
    "LarvSeg": {},
    "LarvSeg, shuffled": {},
}
"""Changes of the method."""
COMPARED = {
    "LarvSeg": {
        "baseline": "+1.1 / +0.0 / +2.2", "baseline, all the weight": "", "LarvSeg, shuffled": "",
    },
}  # fmt: skip
"""Variant -> what it is compared with, and the paper's difference: Table 3, C171 + WA847 + I585."""


@dataclass(frozen=True)
class Study:
    """LarvSeg, its baselines and a control."""

    shards: Path
    """Folder of the shards."""
    weights: Path
    """Weights of tf_efficientnet_lite0."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every variant for each."""
    steps: int = 300
    """Of 8 crops with masks and 8 with labels."""
    storage: Path = Path("runs/study_larvseg")
    """Where the runs and their figures go."""
    processes: int = 2
    """Runs at once, of one core each."""


def run_of(study: Study, variant: str) -> RunConfig:
    from larvseg_folder import Options, stages

    coco, shuffled = study.shards / "coco80", "_shuffled" * variant.endswith("shuffled")
    weak = f"{coco}/train_labels{shuffled}", f"{study.shards}/i21k_like{shuffled}"
    novel = json.loads((coco / "val" / "groups.json").read_text())["novel"]
    options = Options(
        masks=f"{coco}/train", labels=weak, val=f"{coco}/val", novel=tuple(novel), crop=128
    )
    run = stages(options)["train"]
    assert isinstance(run, RunConfig) and run.validation is not None
    augment = AugmentConfig((512, 128), (0.75, 1.5), 128, photometric=False)
    sources = tuple(
        replace(source, slots=1, batch_per_slot=number, augment=augment)
        for source, number in zip(run.sources, (8, 4, 4), strict=True)
    )
    method = replace(
        run.method, cls_weight=WEAK_WEIGHT, aux_weight=WEAK_WEIGHT, top_k=10, warm_up=5,
        distance_threshold=1.0, seg_denominator="valid",
    )  # fmt: skip
    return replace(
        run,
        launch=ALONE,
        sources=sources,
        method=replace(method, **VARIANTS[variant]),
        backbone=replace(LITE0, last_stage=3, output_stride=8, pretrained=str(study.weights)),
        validation=replace(run.validation, mode="whole"),
        optimizer=OPTIMIZER,
    )


def train(study: Study, variant: str, seed: int) -> Row:
    """One run; mIoU in percent."""
    started = time.perf_counter()
    run = run_of(study, variant)
    result = launch(alone(run, study.storage, f"{slug(variant)}-seed{seed}", seed, study.steps))
    scores = {key: result[key] for key in SCORES.values()}
    return {"variant": variant, "seed": seed, **scores, "seconds": time.perf_counter() - started}


def main(study: Study) -> None:
    study = replace(study, storage=study.storage / f"pictures-{study.steps}-steps")
    shared.check_inputs(study.storage, {"shards": study.shards, "weights": study.weights})
    todo = [(study, variant, seed) for seed in study.seeds for variant in VARIANTS]
    rows = run_all(train, todo, study.storage / "results.jsonl", study.processes)
    rows = [row for row in rows if row["seed"] in study.seeds]
    title = f"LarvSeg on real pictures, mIoU, {study.steps} steps"
    shared.show(rows, list(VARIANTS), SCORES, COMPARED, title, "paper, A847")


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
