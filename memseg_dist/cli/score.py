"""`memseg eval`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from memseg_dist.batch import IGNORE
from memseg_dist.cli.model import InferenceFlags, Model, ModelFlags, open_model
from memseg_dist.config import RunConfig, ValidationConfig
from memseg_dist.data.evalset import EvalDataset
from memseg_dist.data.files import make_folder
from memseg_dist.data.index import Index
from memseg_dist.data.pairs import image_counts
from memseg_dist.data.source import supervised_ids
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.evaluation.evaluate import (
    Evaluation,
    EvaluationResult,
    evaluate,
    evaluated_classes,
)
from memseg_dist.evaluation.metrics import EvaluatedClass
from memseg_dist.evaluation.prototype_probe import PrototypeProbeResult, probe_prototypes
from memseg_dist.evaluation.sliding import Inference
from memseg_dist.tools.external import ensure_indexed
from memseg_dist.tools.pictures.draw import draw_panels

EVALUATED = "evaluated"
"""Name of --data in the label space."""


def score(
    model: ModelFlags,
    inference: InferenceFlags,
    data: str | None = None,
    out: Path | None = None,
    panels: int = 0,
    max_images: int | None = None,
    processes: int = 0,
    ignore_unknown: bool = False,
    buckets: bool = False,
    prototype_probe: bool = False,
    points: int = 1,
    runs: int = 5,
) -> None:
    """Score a checkpoint on shards with masks: All / Base / Novel mIoU and a table per class.

    Args:
        data: Folder or URL of the shards; by default the run's own validation set.
        out: Folder for scores.json, classes.csv and panels.
        panels: How many pictures to draw as image | truth | prediction | maps, into --out.
        max_images: Score the first so many images only.
        processes: Loader processes.
        ignore_unknown: Do not count pixels of classes that the model does not know.
        buckets: Score head, common and tail classes too; reads the indexes of the training sets.
        prototype_probe: LarvSeg's exploratory experiment instead: which classes an image shows is
            given, and random pixels of each are its prototypes.
        points: Pixels per class of --prototype-probe.
        runs: Draws of --prototype-probe.
    """
    if panels and out is None:
        raise ValueError(f"--panels {panels} needs --out, the folder to write them to")
    opened = open_model(model, with_memories=bool(panels))
    settings = inference.resolved(opened)
    dataset, classes = _evaluated(opened, data, settings, ignore_unknown, buckets)
    evaluation = Evaluation(
        opened.method,
        dataset,
        classes,
        opened.device,
        inference=settings,
        max_images=max_images,
        num_processes=processes,
    )
    result: EvaluationResult | PrototypeProbeResult
    if prototype_probe:
        result = probe_prototypes(evaluation, num_points=points, num_runs=runs)
    else:
        result = evaluate(evaluation)
    print(f"{model.checkpoint} (step {opened.step})\n{result.table()}")
    if out is not None:
        folder = make_folder(out)
        (folder / "scores.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
        if isinstance(result, EvaluationResult):
            (folder / "classes.csv").write_text(result.scores.class_csv())
        for number, (key, picture) in enumerate(draw_panels(evaluation, panels)):
            name = "".join(letter if letter.isalnum() else "-" for letter in key)
            Image.fromarray(picture).save(folder / f"panel-{number:02d}-{name}.png")
        print(f"written to {out}")


def _evaluated(
    model: Model, data: str | None, settings: Inference, ignore_unknown: bool, buckets: bool
) -> tuple[EvalDataset, list[EvaluatedClass]]:
    """The images to score, and the classes of their vocabulary with their group."""
    config, space = model.config, model.label_space
    validation = config.validation
    if data is not None:
        validation = ValidationConfig(data, EVALUATED)
    if validation is None:
        raise ValueError("the run has no validation set; name one with --data")
    ensure_indexed([validation.path])
    if data is not None:
        space = _with_vocabulary(space, Index.open(data), ignore_unknown)
    name, base, novel = validation.name, validation.base, validation.novel
    if not base and not novel:
        base, novel = _groups(config, space, name)
    counts = image_counts(config.active_sources, space, config.cache_directory) if buckets else None
    classes = evaluated_classes(
        space, name, base=base, novel=novel, exclude=validation.exclude, training_images=counts
    )
    dataset = EvalDataset(
        validation.path, space, name, resize=settings.resize, keep_ratio=settings.keep_ratio
    )
    return dataset, classes


def _with_vocabulary(space: LabelSpace, index: Index, ignore_unknown: bool) -> LabelSpace:
    """`space` with the classes of `index` as the source EVALUATED; unknown ones map to IGNORE."""
    known, uids = space.vocabulary, index.vocabulary.uids
    unknown = [uid for uid in uids if uid not in known]
    if len(unknown) == len(uids) or (unknown and not ignore_unknown):
        names = [index.vocabulary.names[index.vocabulary.index(uid)] for uid in unknown[:3]]
        raise ValueError(
            f"--data {index.root}: {len(unknown)} of its {len(uids)} classes are unknown to the "
            f"model, such as {unknown[:3]} ({', '.join(names)}); give its vocabulary.json the uids "
            "of the training sets, or leave those pixels out with --ignore-unknown"
        )
    ids = np.array([known.index(uid) if uid in known else IGNORE for uid in uids], dtype=np.int32)
    return LabelSpace(known, {**space.to_union, EVALUATED: ids})


def _groups(
    config: RunConfig, space: LabelSpace, name: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Uids of the evaluated classes that had masks in training, and of those that had not."""
    trained = supervised_ids(config.active_sources, space, "masks")
    tested = np.setdiff1d(space.classes(name), IGNORE)
    base, novel = np.intersect1d(tested, trained), np.setdiff1d(tested, trained)
    uids = space.vocabulary.uids
    return tuple(uids[index] for index in base), tuple(uids[index] for index in novel)
