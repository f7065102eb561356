"""Which of RCA's directions show: its parts and settings, by seed.

    python benchmarks/study_rca.py --seeds 0 1 2 3 4                          # generated scenes
    python benchmarks/study_rca.py --pictures SHARDS --weights WEIGHTS --seeds 0 1 2 --steps 350

Each run trains the classifier on image labels (one process, one core), labels the training images
and scores the pseudo masks, with the same fusion for every variant (of real pictures, whose masks
know no background, the class with the largest score). "EPS" learns from the scenes' true
silhouettes as saliency, and is labelled by EPS's own rules as well. A difference is given with its
95 % interval (Student's t over the seeds' differences). What is done already is not done again.

--pictures: SHARDS/{coco80/train,coco80/val,i21k_like}, made by the commands in docs/results.md;
--weights: tf_efficientnet_lite0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import study as shared
import tyro
from PIL import Image
from study import Row, run_all
from study_setup import ALONE, LITE0, OPTIMIZER, alone, slug

from memseg_dist.config import RunConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.cache import ShardCache
from memseg_dist.data.index import Index
from memseg_dist.data.reader import Reader
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.launch import launch
from memseg_dist.methods.rca.config import RCAConfig, released
from memseg_dist.methods.rca.fusion import RULES, FusionConfig
from memseg_dist.methods.rca.labeller import ActivationLabeller
from memseg_dist.stages import LabelConfig
from memseg_dist.tools.pseudo_labels import label
from memseg_dist.tools.splits import open_pool, write_splits

PAPER, SCALED = {"attention_scale": "raw"}, {"attention_scale": "sqrt_dim"}
PARTS: dict[str, dict] = {
    "baseline": {"contrast_weight": 0.0, "aggregation": "off"},
    "+ RSC": {"aggregation": "off"},
    "both": {},
    "both, 1/sqrt(D)": SCALED,
}
SCENES: dict[str, dict] = PARTS | {
    "+ RSA": {"contrast_weight": 0.0},
    "+ RSA, 1/sqrt(D)": {"contrast_weight": 0.0} | SCALED,
    "no mixup": {"mixup": False},
    "gamma 0": {"momentum": 0.0},
    "gamma 0.9": {"momentum": 0.9},
    "K 1": {"num_prototypes": 1},
    "K 1, 1/sqrt(D)": {"num_prototypes": 1} | SCALED,
    "K all": {"num_prototypes": None},
    "preset paper": {},
    "preset released": {},
    "baseline, EPS": PARTS["baseline"] | {"saliency_weight": 1.0},
}
"""Changes of "both", the job's method with the paper's attention; presets: see `method_of`."""
COMPARED = {
    "+ RSC": {"baseline": "+1.3"},
    "+ RSA": {"baseline": "+0.3", "+ RSA, 1/sqrt(D)": ""},
    "both": {
        "baseline": "+3.2", "+ RSC": "+1.9", "both, 1/sqrt(D)": "", "no mixup": "+0.8",
        "gamma 0": "+1.5", "gamma 0.9": "+0.2", "K 1": "+1.0", "K all": "+1.4",
    },
    "both, 1/sqrt(D)": {"K 1, 1/sqrt(D)": "+1.0"},
    "preset paper": {"preset released": ""},
    "baseline, EPS": {"baseline": ""},
}  # fmt: skip
"""Variant -> what it is compared with, and the paper's difference: Table 1 and its ablations."""
NO_BACKGROUND = replace(RULES["eps"], background_score=0.0)
"""Coco80's masks know no background: what none of the classes covers is not scored."""
MAPS = ("accumulated", "predicted", "intermediate")
COLUMNS = {"O, accumulated": "accumulated", "O, predicted": "predicted", "P": "intermediate"}
OTHERS = {"EPS's rules": "eps_rules", "rows set": "memory/fill"}


@dataclass(frozen=True)
class Study:
    """Variants of RCA."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run of every variant for each."""
    variants: tuple[str, ...] = ()
    """Which of the variants to run; all by default, of pictures baseline, RSC and both."""
    steps: int = 480
    """Of 16 pictures; the training scenes are 640."""
    pictures: Path | None = None
    """Folder of shards of real pictures, instead of generated scenes."""
    weights: Path | None = None
    """Weights of tf_efficientnet_lite0 for the real pictures."""
    data: Path = Path("data/scenes_study")
    """Where the scenes are, or are drawn: 12 objects, 640 training pictures."""
    backbone: Path = Path("runs/pretrain_scenes/backbone.safetensors")
    """Weights of jobs/pretrain_scenes.py."""
    storage: Path = Path("runs/study_rca")
    """Where the runs and their figures go."""
    processes: int = 2
    """Runs at once, of one core each."""

    def __post_init__(self) -> None:
        if (self.pictures is None) != (self.weights is None):
            raise ValueError("--pictures and --weights go together")
        unknown = sorted(set(self.variants) - set(SCENES))
        if unknown:
            raise ValueError(f"--variants {unknown}: choose of {list(SCENES)}")

    @property
    def names(self) -> tuple[str, ...]:
        return self.variants or tuple(SCENES if self.pictures is None else PARTS)

    @property
    def train_shards(self) -> str:
        return f"{self.data}/train" if self.pictures is None else f"{self.pictures}/coco80/train"


def method_of(variant: str, method: RCAConfig) -> RCAConfig:
    """The variant's settings, of the job's. The presets keep the paper's alpha_1 and gate."""
    method = replace(method, **PAPER)
    preset = RCAConfig(head_width=method.head_width, map_size=method.map_size, **PAPER)
    if variant == "preset released":
        return released(preset)
    return preset if variant == "preset paper" else replace(method, **SCENES[variant])


def scenes_run(study: Study) -> tuple[RunConfig, FusionConfig]:
    from rca_scenes import FUSION, Options, stages

    run = stages(Options(data=str(study.data), backbone=str(study.backbone)))["classifier"]
    assert isinstance(run, RunConfig)
    # one slot of all 16 pictures: on one process the global batch needs no preview
    sources = (replace(run.sources[0], slots=1, batch_per_slot=16),)
    return replace(run, sources=sources, launch=ALONE), FUSION


def pictures_run(study: Study) -> tuple[RunConfig, FusionConfig]:
    """Pictures of 128 pixels: 8 of COCO and 8 of single objects of its classes a step."""
    from rca_folder import Options, stages

    labels = (study.train_shards, f"{study.pictures}/i21k_like")
    options = Options(labels=labels, val=f"{study.pictures}/coco80/val", crop=128)
    run = stages(options)["classifier"]
    assert isinstance(run, RunConfig)
    whole = AugmentConfig((128, 128), (1.0, 1.0), 128, keep_ratio=False, photometric=False)
    coco, objects = (replace(s, slots=1, batch_per_slot=8, augment=whole) for s in run.sources)
    return replace(
        run,
        launch=ALONE,
        sources=(coco, replace(objects, split="coco80")),
        method=replace(
            run.method, reduce_to=None, contrast_weight=0.1, gate=0.5, head_width=64, map_size=16
        ),
        backbone=replace(LITE0, last_stage=3, output_stride=8, pretrained=str(study.weights)),
        optimizer=OPTIMIZER,
    ), NO_BACKGROUND


def train(study: Study, variant: str, seed: int) -> Row:
    """Train, label and score one run; figures as percent."""
    started = time.perf_counter()
    run, fusion = scenes_run(study) if study.pictures is None else pictures_run(study)
    assert isinstance(run.method, RCAConfig)
    run = replace(run, method=method_of(variant, run.method), validation=None)
    learns_saliency = run.method.saliency_weight > 0
    if learns_saliency:
        source = replace(run.sources[0], saliency=f"{study.data}/saliency")
        run = replace(run, sources=(source,))
    run = alone(run, study.storage, f"{slug(variant)}-seed{seed}", seed, study.steps)
    result = launch(run)
    row: Row = {"variant": variant, "seed": seed}

    def score(key: str, labeller: ActivationLabeller) -> None:
        report = label(
            LabelConfig(
                result["checkpoint"], study.train_shards, f"{run.directory}/{key}", labeller,
                truth=study.train_shards, workers=0, num_pictures=8,
            )
        )  # fmt: skip
        assert report.scores is not None
        row[key] = report.scores.excluded.miou()
        row[f"{key}, unknown wrong"] = report.scores.wrong.miou()

    for maps in MAPS:
        score(maps, ActivationLabeller(maps=maps, scales=(1.0,), fusion=fusion))
    if learns_saliency:
        score("eps_rules", ActivationLabeller(maps="predicted", fusion=RULES["eps"]))
    fill = {key: 100 * value for key, value in result.items() if key == "memory/fill"}
    return row | fill | {"seconds": time.perf_counter() - started}


def prepare(study: Study) -> None:
    """Scenes and backbone, where they are not there yet; the split of the single objects."""
    if study.pictures is not None:
        objects = str(study.pictures / "i21k_like")
        known = Vocabulary.load(study.pictures / "coco80" / "val" / "vocabulary.json")
        index = Index.open(objects)
        pool = open_pool(index)
        is_known = np.array([uid in known for uid in index.vocabulary.uids])
        chosen = np.unique(pool.image[is_known[pool.label]])
        write_splits(objects, {"coco80": [pool.keys[image] for image in chosen]}, overwrite=False)
        return
    from demo import prepare_backbone, run

    if not (study.data / "val" / "index.parquet").exists():
        run(
            "datasets/scenes_weak.py", "--root", study.data, "--num-objects", 12,
            "--train", 640, "--val", 200,
        )  # fmt: skip
    write_saliency(study)
    prepare_backbone(study.backbone)


def write_saliency(study: Study) -> None:
    """Silhouettes of the training scenes' objects, by their masks, beside the shards."""
    folder, index = study.data / "saliency", Index.open(study.train_shards)
    reader = Reader(index, ShardCache(folder, 0), np.arange(len(index.vocabulary), dtype=np.int32))
    background = index.vocabulary.index("background")
    for row in range(len(index)):
        path = folder / f"{index.key(row)}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            mask = reader.read_mask(row).numpy()
            silhouette = np.where(mask == background, 0, 255).astype(np.uint8)
            Image.fromarray(silhouette).save(path)


def main(study: Study) -> None:
    prepare(study)
    kind = "scenes" if study.pictures is None else "pictures"
    study = replace(study, storage=study.storage / f"{kind}-{study.steps}-steps")
    inputs = ("data", "backbone") if study.pictures is None else ("pictures", "weights")
    shared.check_inputs(study.storage, {name: getattr(study, name) for name in inputs})
    todo = [(study, variant, seed) for seed in study.seeds for variant in study.names]
    rows = run_all(train, todo, study.storage / "results.jsonl", study.processes)
    rows = [row for row in rows if row["seed"] in study.seeds]
    title = f"Pseudo masks of the training images, mIoU, {kind}, {study.steps} steps"
    wrong = {f"{head}, unknown wrong": f"{key}, unknown wrong" for head, key in COLUMNS.items()}
    shared.show(rows, study.names, COLUMNS | OTHERS, COMPARED, title, "paper, VOC")
    shared.show(rows, study.names, wrong, COMPARED, f"{title}, unknown pixels wrong", "paper, VOC")


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
