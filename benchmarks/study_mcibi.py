"""What the memory of MCIBI is worth: segmenters with and without it, and its controls, by seed.

    python benchmarks/study_mcibi.py --seeds 0 1 2 3 4                     # generated scenes
    python benchmarks/study_mcibi.py --pictures SHARDS --weights WEIGHTS --seeds 0 1 2

Every variant has the same budget, data order and start; each run takes one core. A control is the
same graph with other vectors in the place of the memory: zeros, fixed random codes, learned codes,
or the image's own pixels. A difference is given with its 95 % interval (Student's t over the
seeds' differences). What is done already is not done again.

--pictures: SHARDS/{train,val,test} as datasets/folder.py writes them, of street scenes of 4:3 (the
figures in docs/results.md are of CamVid's 11 classes); --weights: tf_efficientnet_lite0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import study as shared
import tyro
from study import Row, run_all
from study_setup import LITE0, OPTIMIZER, alone, slug

from memseg_dist.config import RunConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.launch import launch

NO_RCL = {"consistency_weight": 0.0}
RCL_FROM = {"consistency_epochs": 0.1}
"""The paper has it from the start; a memory is then a few steps old."""
CONTEXTS = {"FCN": "none", "PSPNet": "ppm", "OCRNet": "ocr", "DeepLabV3": "aspp"}
CONTROLS = {
    "": {},
    " + zeros": {"memory": "zero"},
    " + random codes": {"memory": "random"},
    " + learned codes": {"memory": "learnable"},
    " + own pixels": {"memory": "image"},
}
"""On the graph of MCIBI, by what is added to its name."""


def variants(name: str, *, controls: bool) -> dict[str, dict]:
    """A segmenter, with MCIBI (memory and RCL), and with the memory alone or a control of it."""
    plain = {"context": CONTEXTS[name]}
    found = {name: plain | {"memory": "off"}, f"{name} + MCIBI": plain | RCL_FROM}
    if controls:
        found[f"{name} + memory"] = plain | NO_RCL
        found |= {name + what: plain | NO_RCL | change for what, change in CONTROLS.items() if what}
    return found


SCENES = (
    variants("FCN", controls=True)
    | variants("PSPNet", controls=False)
    | variants("OCRNet", controls=False)
    | variants("DeepLabV3", controls=False)
    | {
        "FCN + memory, add": NO_RCL | {"fusion": "add"},
        "FCN + memory, weighted add": NO_RCL | {"fusion": "weighted_add"},
    }
)
PICTURES = variants("FCN", controls=True) | variants("DeepLabV3", controls=True)
COMPARED = {
    "FCN + MCIBI": {"FCN": "+5.88", "FCN + memory": "+0.66"},
    "PSPNet + MCIBI": {"PSPNet": "+1.13"},
    "OCRNet + MCIBI": {"OCRNet": "+0.87"},
    "DeepLabV3 + MCIBI": {"DeepLabV3": "+1.15", "DeepLabV3 + memory": ""},
    "FCN + memory": {
        "FCN": "+5.22", "FCN + memory, add": "+1.19", "FCN + memory, weighted add": "+1.01",
        **{f"FCN{what}": "" for what in CONTROLS if what},
    },
    "DeepLabV3 + memory": {
        "DeepLabV3": "", **{f"DeepLabV3{what}": "" for what in CONTROLS if what},
    },
}  # fmt: skip
"""Variant -> what it is compared with, and the paper's difference on ADE20K with ResNet-50."""


@dataclass(frozen=True)
class Study:
    """MCIBI, its baselines and its controls."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run of every variant for each."""
    variants: tuple[str, ...] = ()
    """Which variants to run; all by default."""
    steps: int = 300
    pictures: Path | None = None
    """Folder of shards of real pictures, instead of generated scenes."""
    weights: Path | None = None
    """Weights of tf_efficientnet_lite0 for the real pictures."""
    data: Path = Path("data/scenes")
    """Where the scenes are, or are drawn."""
    backbone: Path = Path("runs/pretrain_scenes/backbone.safetensors")
    """Weights of jobs/pretrain_scenes.py."""
    storage: Path = Path("runs/study_mcibi")
    """Where the runs and their figures go."""
    processes: int = 2
    """Runs at once, of one core each."""

    def __post_init__(self) -> None:
        if (self.pictures is None) != (self.weights is None):
            raise ValueError("--pictures and --weights go together")
        unknown = sorted(set(self.variants) - set(self.known))
        if unknown:
            raise ValueError(f"--variants {unknown}: choose of {list(self.known)}")

    @property
    def known(self) -> dict[str, dict]:
        return SCENES if self.pictures is None else PICTURES


def scenes_run(study: Study) -> RunConfig:
    from mcibi_scenes import Options, stages

    run = stages(Options(data=str(study.data), backbone=str(study.backbone)))["train"]
    assert isinstance(run, RunConfig)
    return replace(run, sources=(replace(run.sources[0], slots=1),))


def pictures_run(study: Study) -> RunConfig:
    """Pictures of 240 x 180 pixels, crops of 144, two stages of lite0 joined at stride 8."""
    from mcibi_folder import Options, stages

    options = Options(masks=f"{study.pictures}/train", val=f"{study.pictures}/test", crop=144)
    run = stages(options)["train"]
    assert isinstance(run, RunConfig) and run.validation is not None
    augment = AugmentConfig((240, 180), (0.75, 1.5), 144, photometric=False)
    return replace(
        run,
        sources=(replace(run.sources[0], slots=1, augment=augment),),
        method=replace(run.method, dim=64, rates=(3, 6, 9), stages=(2, 3), pixels="all"),
        backbone=replace(LITE0, pretrained=str(study.weights)),
        validation=replace(run.validation, resize=(240, 180)),
        optimizer=OPTIMIZER,
    )


def train(study: Study, variant: str, seed: int) -> Row:
    """One run; mIoU in percent."""
    started = time.perf_counter()
    run = scenes_run(study) if study.pictures is None else pictures_run(study)
    run = replace(run, method=replace(run.method, **study.known[variant]))
    run = alone(run, study.storage, f"{slug(variant)}-seed{seed}", seed, study.steps)
    result = launch(run)
    seconds = time.perf_counter() - started
    return {"variant": variant, "seed": seed, "miou": result["val/miou_all"], "seconds": seconds}


def main(study: Study) -> None:
    if study.pictures is None:
        from demo import prepare_backbone, prepare_scenes

        prepare_scenes(study.data)
        prepare_backbone(study.backbone, study.data)
    names = study.variants or tuple(study.known)
    kind = "scenes" if study.pictures is None else "pictures"
    study = replace(study, storage=study.storage / f"{kind}-{study.steps}-steps")
    inputs = ("data", "backbone") if study.pictures is None else ("pictures", "weights")
    shared.check_inputs(study.storage, {name: getattr(study, name) for name in inputs})
    todo = [(study, variant, seed) for seed in study.seeds for variant in names]
    file = study.storage / "results.jsonl"
    rows = run_all(train, todo, file, study.processes)
    rows = [row for row in rows if row["seed"] in study.seeds]
    title = f"MCIBI on {kind}, {study.steps} steps"
    shared.show(rows, names, {"mIoU": "miou"}, COMPARED, title, "paper, ADE20K")


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
