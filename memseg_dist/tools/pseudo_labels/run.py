"""The label stage: tasks, report and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from memseg_dist.batch import derive_seed
from memseg_dist.data.files import absolute
from memseg_dist.data.index import Index
from memseg_dist.data.source import Source, check_source
from memseg_dist.jsonable import encode
from memseg_dist.platforms.folder import FolderTracker
from memseg_dist.stages import LabelConfig
from memseg_dist.tools.build import BuildOptions, ShardTask, build_dataset
from memseg_dist.tools.external import ensure_indexed
from memseg_dist.tools.pseudo_labels.classes import choose_classes
from memseg_dist.tools.pseudo_labels.model import CheckpointModel
from memseg_dist.tools.pseudo_labels.report import LabelReport, read_report
from memseg_dist.tools.pseudo_labels.scores import ids_in_truth, score_pseudo_labels
from memseg_dist.tools.pseudo_labels.task import LabelTask, draw_labels, label_samples
from memseg_dist.train.load_model import chosen_device, find_checkpoint
from memseg_dist.train.platform import Tracker, Trackers


def label(config: LabelConfig, tracker: Tracker | None = None) -> LabelReport:
    """Write the label maps, their pictures and a report; tracker: gets pictures and figures too.

    ValueError for a checkpoint without what is asked for, classes that it does not know, or an
    output folder that holds something else.
    """
    config = replace(
        config,
        checkpoint=absolute(config.checkpoint),
        data=absolute(config.data),
        truth=config.truth and absolute(config.truth),
        out=absolute(config.out),  # Ray's tasks run elsewhere
    )
    checkpoint, labeller = find_checkpoint(config.checkpoint), config.labeller
    model = CheckpointModel(checkpoint, config.device)
    ensure_indexed([config.data, config.truth] if config.truth else [config.data])
    index = Index.open(config.data)
    source = Source("label", config.data, "labels", on_corrupt="skip")
    check_source(source, index, len(index.vocabulary))
    labeller.check_data(index.key(0))
    labeller.check(model)
    workers = config.workers
    if labeller.runs_network and chosen_device(config.device).type == "cuda" and workers is None:
        workers = 0  # a Ray task has no GPU; this process has one
    num_images = min(len(index), config.max_images or len(index))
    classes = choose_classes(index, model, labeller, num_images)
    if config.truth:  # asked before the hours that the labels take
        ids_in_truth(classes.vocabulary, Index.open(config.truth).vocabulary, config.truth)
    content = encode([checkpoint.manifest, classes])
    digest = derive_seed("labels", json.dumps(content, sort_keys=True))
    starts, stops = index.shard_starts[:-1].tolist(), index.shard_starts[1:].tolist()
    tasks = [
        LabelTask(
            checkpoint.path, digest, labeller, config.device, config.data,
            start, min(stop, num_images), classes,
        )
        for start, stop in zip(starts, stops, strict=True)
        if start < num_images
    ]  # fmt: skip
    built = build_dataset(
        Path(config.out),
        classes.vocabulary,
        [ShardTask(label_samples, task) for task in tasks],
        BuildOptions(Path(config.out), workers=workers, overwrite=config.overwrite),
        stamp=index.fingerprint(),
    )
    scores = score_pseudo_labels(config.out, config.truth) if config.truth else None
    report = read_report(built, classes.left_out, scores)
    folder = FolderTracker(config.out)
    listeners = Trackers([folder, tracker or Tracker()])
    for number, picture in enumerate(draw_labels(tasks, config.num_pictures)):
        folder.log_image(f"panels/{number:02d}", picture, checkpoint.step)
        if tracker is not None:  # whose run may have panels of its own
            tracker.log_image(f"labels/{number:02d}", picture, checkpoint.step)
    listeners.log_metrics(report.metrics(), checkpoint.step)
    listeners.log_text("label_report.txt", f"{report}\n")
    if scores is not None:
        listeners.log_text("label_scores.json", json.dumps(scores.to_json(), indent=2) + "\n")
    return report
