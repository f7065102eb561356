"""Which of RCA's directions show on the generated scenes: variants x seeds, paired by seed.

    python benchmarks/study_rca.py --seeds 0 1 2 3 4

Each run trains the classifier on image labels (one process, one core), labels the training images
and scores the pseudo masks, with the same fusion for every variant. A difference is given with its
95 % interval (Student's t over the seeds' differences). What is done already is not done again.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from memseg_dist.tools import study as shared
from memseg_dist.tools.study import interval, mean_and_spread, paired, run_all

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")

VARIANTS: dict[str, dict] = {
    "baseline": {"contrast_weight": 0.0, "aggregation": "off"},
    "+ RSC": {"aggregation": "off"},
    "+ RSA": {"contrast_weight": 0.0},
    "both": {},
    "no mixup": {"mixup": False},
    "gamma 0": {"momentum": 0.0},
    "gamma 0.9": {"momentum": 0.9},
    "K 1": {"num_prototypes": 1},
    "K all": {"num_prototypes": None},
    "alpha_1 0.01": {"contrast_weight": 0.01},
    "preset paper": {},
    "preset released": {},
}
"""Changes to `METHOD` of jobs/rca_scenes.py ("both"); the presets replace it, see `method_of`."""
COMPARED = (
    ("+ RSC", "baseline", "+1.3"),
    ("+ RSA", "baseline", "+0.3"),
    ("both", "baseline", "+3.2"),
    ("both", "+ RSC", "+1.9"),
    ("both", "no mixup", "+0.8"),
    ("both", "gamma 0", "+1.5"),
    ("both", "gamma 0.9", "+0.2"),
    ("both", "K 1", "+1.0"),
    ("both", "K all", "+1.4"),
    ("both", "alpha_1 0.01", "?"),
    ("preset paper", "preset released", "?"),
)
"""(variant, against, the paper's difference on VOC with VGG16: Table 1 and its ablations)."""
MAPS = ("accumulated", "predicted")
SCORES = (*MAPS, *(f"{maps}, unknown wrong" for maps in MAPS))


@dataclass(frozen=True)
class Study:
    """Variants of RCA on generated scenes."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run of every variant for each."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which of the variants to run."""
    data: Path = Path("data/scenes_study")
    """Where the scenes are drawn: 12 objects, 640 training pictures."""
    backbone: Path = Path("runs/demo/pretrain_scenes/backbone.safetensors")
    """Weights of jobs/pretrain_scenes.py (`make demo` writes them here)."""
    storage: Path = Path("runs/study_rca")
    """Where the runs and their figures go."""
    epochs: int = 12
    """Passes over the training pictures."""
    processes: int = 2
    """Runs at once, of one core each."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.variants) - set(VARIANTS))
        if unknown:
            raise ValueError(f"--variants {unknown}: choose of {list(VARIANTS)}")


def method_of(variant: str):
    """The variant's RCAConfig. The presets keep the paper's alpha_1 and gate."""
    from memseg_dist.methods.rca.config import RCAConfig, released

    _import_jobs()
    from rca_scenes import METHOD

    preset = RCAConfig(head_width=METHOD.head_width, map_size=METHOD.map_size)
    if variant == "preset released":
        return released(preset)
    return preset if variant == "preset paper" else replace(METHOD, **VARIANTS[variant])


def run(study: Study, variant: str, seed: int) -> dict:
    """Train, label and score one run; figures as percent."""
    from memseg_dist.config import (
        EngineConfig,
        Intervals,
        LaunchConfig,
        LoaderConfig,
        TrackingConfig,
    )
    from memseg_dist.launch import launch
    from memseg_dist.methods.rca.labeller import ActivationLabeller
    from memseg_dist.stages import LabelConfig
    from memseg_dist.tools.pseudo_labels import label

    method = method_of(variant)
    from rca_scenes import FUSION, Options, stages

    started = time.perf_counter()
    options = Options(data=str(study.data), backbone=str(study.backbone))
    config = stages(options)["classifier"]
    steps = study.epochs * 40
    name = f"{variant.replace(' ', '_').replace('+', 'plus')}-seed{seed}"
    config = replace(
        config,
        name=name,
        storage=str(study.storage),
        seed=seed,
        # one slot of all 16 pictures: on one process the global batch needs no preview
        sources=(replace(config.sources[0], slots=1, batch_per_slot=16),),
        method=method,
        validation=None,
        steps=steps,
        engine=EngineConfig("torch"),
        launch=LaunchConfig("local", workers=1),
        loader=LoaderConfig(processes=0, cache_dir=str(study.storage / "cache")),
        tracking=TrackingConfig("none"),
        every=Intervals(log=40, evaluate=steps, checkpoint=steps),
    )
    result = launch(config)
    figures: dict = {"variant": variant, "seed": seed}
    for maps in MAPS:
        report = label(
            LabelConfig(
                result["checkpoint"], f"{study.data}/train", f"{config.directory}/{maps}",
                ActivationLabeller(maps=maps, scales=(1.0,), fusion=FUSION),
                truth=f"{study.data}/train", workers=0, num_pictures=4,
            )
        )  # fmt: skip
        assert report.scores is not None
        figures[maps] = report.scores.excluded.miou()
        figures[f"{maps}, unknown wrong"] = report.scores.wrong.miou()
    fill = {key: value for key, value in result.items() if key.startswith("memory/")}
    return figures | fill | {"seconds": time.perf_counter() - started}


def main(study: Study) -> None:
    prepare(study)
    file = study.storage / f"results-{study.epochs}-epochs.jsonl"
    todo = [(study, variant, seed) for seed in study.seeds for variant in study.variants]
    done = run_all(run, todo, file, study.processes)
    rows = [row for row in done if row["seed"] in study.seeds and row["variant"] in study.variants]
    show(rows, study)


def show(rows: list[dict], study: Study) -> None:
    title = f"Pseudo masks of the training images, mIoU, {study.epochs} epochs"
    scores = Table("variant", "runs", *SCORES, "rows set", "s/run", title=title)
    for variant in study.variants:
        own = [row for row in rows if row["variant"] == variant]
        cells = [mean_and_spread([row[maps] for row in own]) for maps in SCORES]
        fill = [100 * row["memory/fill"] for row in own if "memory/fill" in row]
        filled = f"{statistics.mean(fill):.0f} %" if fill else "-"
        seconds = f"{statistics.mean(row['seconds'] for row in own):.0f}" if own else "-"
        scores.add_row(variant, str(len(own)), *cells, filled, seconds)
    title = "Paired differences, mean and 95 % interval; * : excludes 0"
    directions = Table("difference", "paper, VOC", *SCORES, title=title)
    for variant, against, paper in COMPARED:
        if {variant, against} <= set(study.variants):
            cells = [interval(paired(rows, variant, against, maps)) for maps in SCORES]
            directions.add_row(f"{variant} - {against}", paper, *cells)
    console = Console(width=130)
    console.print(scores)
    console.print(directions)


def prepare(study: Study) -> None:
    """Scenes and backbone, where they are not there yet."""
    if not (study.data / "val" / "index.parquet").exists():
        shared.run(
            ROOT, "datasets/scenes_weak.py", "--root", study.data, "--num-objects", 12,
            "--train", 640, "--val", 200,
        )  # fmt: skip
    shared.prepare_backbone(ROOT, study.backbone)


def _import_jobs() -> None:
    import sys

    if str(ROOT / "jobs") not in sys.path:
        sys.path.insert(0, str(ROOT / "jobs"))


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
