"""What unlabelled images are worth: PseudoSeg and Three-stage with few masks, their parts and what
they are compared with, split by split.

    python benchmarks/study_semi.py --seeds 0 1 2 3 4                       # generated scenes
    python benchmarks/study_semi.py --pictures SHARDS --weights WEIGHTS --seeds 0 1 2

A seed is a split of the training images, in which every class occurs, and the seed of the runs on
it. Every network has the same optimizer steps and labelled images a step, on one core; a difference
is given with its 95 % interval (Student's t over the splits' differences). What is done already is
not done again.

--pictures: SHARDS/{train,val,test} as datasets/folder.py writes them, of street scenes of 4:3 (the
figures in docs/results.md are of CamVid's 11 classes); --weights: tf_efficientnet_lite0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import study as shared
import tyro
from study import Row, run_all
from study_setup import LITE0, OPTIMIZER, alone, slug

from memseg_dist.config import RunConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.index import Index
from memseg_dist.launch import launch
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.stages import LabelConfig, Stage, resolved
from memseg_dist.tools.pseudo_labels import label
from memseg_dist.tools.splits import draw, number_of, open_pool, write_splits

PSEUDOSEG: dict[str, dict[str, Any]] = {
    "supervised": {"recipe": "supervised"},
    "PseudoSeg": {},
    "PseudoSeg, image labels": {"image_labels": "image"},
    "decoder alone": {"method": {"pseudo_label": "decoder"}},
    "activation alone": {"method": {"pseudo_label": "activation"}},
    "PseudoSeg, T = 1": {"method": {"temperature": 1.0}},
}
"""Options of the job, and changes of the method."""
THIRD_STAGES: dict[str, dict[str, Any]] = {
    "stage 3": {},
    "stage 3, no strong augmentation": {"strong": False},
    "stage 3, no consistency": {"consistency_weight": 0.0},
    "stage 3, no Task 2": {"pseudo_weight": 0.0},
    "stage 3, no EMA": {"teacher": "student"},
}
"""Changes of the method."""
PHASES = (
    (*PSEUDOSEG, "stage 1"),
    ("self-training", "stage 2"),
    tuple(THIRD_STAGES),
)
"""What needs the results of the phase before."""
SCENES = [name for phase in PHASES for name in phase]
PICTURES = ["supervised", "self-training", "PseudoSeg", "stage 1", "stage 2", "stage 3"]
NUM_SCENES, NUM_OBJECTS = 640, 12
"""A sixteenth of the masks is 40: in runs of a minute they teach less than all of them do."""
SCENE_FLAGS = ("--masks", NUM_SCENES, "--num-objects", NUM_OBJECTS)
ALL = "all"
"""In the place of a share: every mask."""
COMPARED = {
    "PseudoSeg": {
        "supervised": "+11.03", "self-training": "+2.86", "decoder alone": "+13.86",
        "activation alone": "+13.64", "PseudoSeg, T = 1": "+3.07",
        "PseudoSeg, image labels": "-4.16",
    },
    "self-training": {"supervised": "+8.17"},
    "stage 2": {"stage 1": "+6.34"},
    "stage 3": {
        "stage 1": "+7.94", "stage 2": "+1.60", "stage 3, no strong augmentation": "+6.89",
        "stage 3, no consistency": "+4.65", "stage 3, no Task 2": "+2.22",
        "stage 3, no EMA": "+1.48",
    },
}  # fmt: skip
"""Variant -> what it is compared with, and the paper's difference: PseudoSeg's on VOC with 1/16 of
the masks (of T with image labels), Three-stage's on Cityscapes with 100."""
COLUMNS = {"mIoU": "miou", "labels": "labels"} | {
    f"ECE {source}": f"val/ece/{source}"
    for source in ("decoder", "activation", "fused", "sharpened")
}
"""Heading -> key of the rows."""


@dataclass(frozen=True)
class Study:
    """PseudoSeg and Three-stage, what they are made of and what they are compared with."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One split of each size, and one run of every variant on it, for each."""
    shares: tuple[str, ...] = ()
    """Shares of the masks; by default 1/16 and 1/4, of pictures 1/16, 1/8, 1/4 and all."""
    variants: tuple[str, ...] = ()
    """Which variants to run; all by default, of pictures those of a paper's main table."""
    steps: int = 300
    """Of every network."""
    pictures: Path | None = None
    """Folder of shards of real pictures, instead of generated scenes."""
    weights: Path | None = None
    """Weights of tf_efficientnet_lite0 for the real pictures."""
    data: Path = Path("data/scenes_12")
    """Where the scenes are, or are drawn: fewer, and with fewer classes, than a job's."""
    backbone: Path = Path("runs/pretrain_scenes/backbone.safetensors")
    """Weights of jobs/pretrain_scenes.py."""
    storage: Path = Path("runs/study_semi")
    """Where the runs and their figures go."""
    processes: int = 2
    """Runs at once, of one core each."""

    def __post_init__(self) -> None:
        if (self.pictures is None) != (self.weights is None):
            raise ValueError("--pictures and --weights go together")
        unknown = sorted(set(self.variants) - set(SCENES))
        if unknown:
            raise ValueError(f"--variants {unknown}: choose of {SCENES}")

    @property
    def names(self) -> Sequence[str]:
        return self.variants or (SCENES if self.pictures is None else PICTURES)

    @property
    def known_shares(self) -> Sequence[str]:
        default = ("1/16", "1/4") if self.pictures is None else ("1/16", "1/8", "1/4", ALL)
        return self.shares or default

    @property
    def train_shards(self) -> str:
        return str(self.data / "masks" if self.pictures is None else self.pictures / "train")


def main(study: Study) -> None:
    if study.pictures is None:
        from demo import prepare_backbone, prepare_scenes

        prepare_scenes(study.data, *SCENE_FLAGS)
        prepare_backbone(study.backbone)
    kind = "scenes" if study.pictures is None else "pictures"
    study = replace(study, storage=study.storage / f"{kind}-{study.steps}-steps")
    shared.check_inputs(study.storage, inputs_of(study))
    make_splits(study)
    file = study.storage / "results.jsonl"
    rows: list[Row] = []
    for phase in PHASES:
        todo = [
            (study, f"{share} {name}", seed)
            for seed in study.seeds
            for share in study.known_shares
            for name in study.names
            if name in phase and (share != ALL or name in ("supervised", "stage 1"))
        ]
        rows = run_all(train, todo, file, study.processes)
    for share in study.known_shares:
        shown = of_share(rows, share, study.seeds)
        title = f"{share} of the masks, {kind}, {study.steps} steps"
        shared.show(shown, [name for name in SCENES if name in study.names], COLUMNS, COMPARED,
                    title, "paper")  # fmt: skip


def train(study: Study, variant: str, seed: int) -> Row:
    """One network, and the label stage that the next phase needs; scores in percent."""
    started = time.perf_counter()
    share, name = variant.split(" ", 1)
    stages = resolved(stages_of(study, share, name, seed))
    row: Row = {"variant": variant, "seed": seed}
    for stage in stages.values():
        if isinstance(stage, RunConfig):
            result = launch(stage)
            ece = {key: value for key, value in result.items() if key.startswith("val/ece/")}
            row |= {"miou": result["val/miou_all"], **ece}
        elif isinstance(stage, LabelConfig):
            report = label(stage)
            assert report.scores is not None
            row["labels"] = report.scores.excluded.miou()
    return row | {"seconds": time.perf_counter() - started}


# -------------------------------------------------------------------- what a variant is


def split_of(share: str, seed: int) -> str | None:
    return None if share == ALL else f"{share.replace('/', '_')}-study{seed}"


def stages_of(study: Study, share: str, name: str, seed: int) -> dict[str, Stage]:
    """The stages of one row: a network, after the labels that it learns from, with those that
    others need after it.
    """
    options = {
        "split": split_of(share, seed),
        "storage": str(study.storage),
        "seed": seed,
    }
    tag = f"{share.replace('/', '_')}-seed{seed}"
    if name in PSEUDOSEG:
        stages = pseudoseg(study, options, **PSEUDOSEG[name])
        stages = {"train": replace(stages["train"], name=f"{slug(name)}-{tag}")}
    elif name == "self-training":
        stages = pseudoseg(study, options, recipe="self-training")
        stages["teacher"] = replace(stages["teacher"], name=f"supervised-{tag}")
        stages["student"] = replace(stages["student"], name=f"self_training-{tag}")
    else:
        stages = three_stage(study, options | {"name": f"three_stage-{tag}"})
        wanted = {"stage 1": ("stage1", "labels1"), "stage 2": ("stage2", "labels2")}
        stages = resolved(stages)
        if name in wanted:
            labels = wanted[name] if share != ALL else wanted[name][:1]
            stages = {key: stages[key] for key in labels}
        else:
            last = stages["stage3"]
            method = replace(last.method, **THIRD_STAGES[name])
            stages = {"stage3": replace(last, name=f"{slug(name)}-{tag}", method=method)}
    return {key: prepared(study, stage) for key, stage in stages.items()}


def pseudoseg(study: Study, options: dict, method: Mapping | None = None, **more) -> dict:
    """The job's stages, with a changed method."""
    if study.pictures is None:
        from pseudoseg_scenes import Options, stages

        found = stages(Options(**scenes_options(study), **options, **more))
    else:
        from pseudoseg_folder import Options, stages

        found = stages(Options(**pictures_options(study), **options, **more))

    def changed(run: RunConfig) -> RunConfig:
        small = PSEUDOSEG_ON_PICTURES if study.pictures is not None else {}
        return replace(run, method=replace(run.method, **small, **(method or {})))

    return {k: changed(s) if isinstance(s, RunConfig) else s for k, s in found.items()}


def three_stage(study: Study, options: dict) -> dict:
    if study.pictures is None:
        from three_stage_scenes import Options, stages

        return stages(Options(**scenes_options(study), **options))
    from three_stage_folder import Options, stages

    return stages(Options(**pictures_options(study), **options))


def scenes_options(study: Study) -> dict:
    paths = {"data": str(study.data), "backbone": str(study.backbone)}
    return paths | {"num_objects": NUM_OBJECTS}


def pictures_options(study: Study) -> dict:
    return {"masks": study.train_shards, "val": f"{study.pictures}/test", "crop": 144}


PSEUDOSEG_ON_PICTURES = {"stages": (1, -2, -1), "dim": 64, "attention_dim": 32, "rates": (2, 4, 6)}
AUGMENT = AugmentConfig((240, 180), (0.75, 1.5), 144, photometric=False, category_max_ratio=1.0)


def prepared(study: Study, stage: Stage) -> Stage:
    """With the study's budget: 4 labelled and 4 other pictures a step."""
    if isinstance(stage, LabelConfig):
        return replace(stage, truth=study.train_shards, workers=0, num_pictures=4)
    from three_stage_recipes import FAST_DECAYS

    assert isinstance(stage, RunConfig)
    sources = tuple(replace(source, slots=1, batch_per_slot=4) for source in stage.sources)
    run = alone(stage, study.storage, stage.name, stage.seed, study.steps, sources=sources)
    if study.pictures is None:
        return run
    if isinstance(run.method, ThreeStageConfig):
        run = replace(run, method=replace(run.method, decays=FAST_DECAYS))
    assert run.validation is not None
    return replace(
        run,
        sources=tuple(replace(source, augment=AUGMENT) for source in sources),
        backbone=replace(
            LITE0,
            last_stage=3,
            pretrained=str(study.weights),
            frozen_batchnorm=run.backbone.frozen_batchnorm,
            output_stride=8 if run.backbone.frozen_batchnorm else None,
        ),
        validation=replace(run.validation, resize=(240, 180)),
        optimizer=OPTIMIZER,
    )


# -------------------------------------------------------------------- inputs and tables


def inputs_of(study: Study) -> dict[str, Path | None]:
    names = ("data", "backbone") if study.pictures is None else ("pictures", "weights")
    return {name: getattr(study, name) for name in names}


def make_splits(study: Study) -> None:
    """As `memseg data split --rule every-class` makes them, under names of the study."""
    pool = open_pool(Index.open(study.train_shards))
    splits = {
        split_of(share, seed): draw(pool, number_of(share, len(pool.keys)), "every-class", seed)
        for share in study.known_shares
        for seed in study.seeds
        if share != ALL
    }
    write_splits(study.train_shards, splits, overwrite=False)


def of_share(rows: Sequence[Row], share: str, seeds: Sequence[int]) -> list[Row]:
    """Rows of one share, with their variants' names alone and calibration errors in percent."""
    parts = [(row, *row["variant"].split(" ", 1)) for row in rows if row["seed"] in seeds]
    return [
        {key: 100 * value if "/ece/" in key else value for key, value in row.items()}
        | {"variant": name}
        for row, own, name in parts
        if own == share
    ]


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
