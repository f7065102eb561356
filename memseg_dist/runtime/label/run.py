"""The run: options, tasks, report and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memseg_dist.batch import derive_seed
from memseg_dist.data.index import Index
from memseg_dist.data.saliency import check_has_saliency
from memseg_dist.data.source import Source, check_source
from memseg_dist.evaluation.fusion import FusionConfig
from memseg_dist.evaluation.pseudo import score_pseudo_labels
from memseg_dist.runtime.api import NullTracker, Tracker, Trackers
from memseg_dist.runtime.build import BuildOptions, ShardTask, build_dataset
from memseg_dist.runtime.folder import FolderTracker
from memseg_dist.runtime.label.classes import LabelClasses, absolute, choose_classes
from memseg_dist.runtime.label.panels import draw_labels
from memseg_dist.runtime.label.report import LabelReport, read_report
from memseg_dist.runtime.label.task import LabelTask, MapsKind, label_samples
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.trained import chosen_device, find_checkpoint


@dataclass(frozen=True)
class LabelConfig:
    """What to label, with what, and how."""

    checkpoint: str
    """A run's directory, its checkpoints/ or one of them (.../step-00001000)."""
    data: str
    """Folder or URL of the shards to label; their image labels say what there is to be found."""
    out: Path
    """Folder to write to: shards of the same names and keys, with masks."""
    background: str = "background"
    """Uid of the class that everything else belongs to; the first of the classes written."""
    maps: MapsKind = "accumulated"
    """accumulated: the maps that the run kept of its training images; predicted: class activation
    maps of the final weights, for any run and any images."""
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Of predicted maps: the sizes of the image, relative to its own."""
    flip: bool = True
    """Of predicted maps: look at the mirrored image as well."""
    saliency: str | None = None
    """Folder or URL of saliency maps <key>.png (8-bit grey, 255 = salient)."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    truth: str | None = None
    """Shards with masks of some of the same images: score the labels against them at the end."""
    workers: int | None = None
    """Parallel tasks on this machine; 0 = in this process, without Ray; default: this process for
    predicted maps if it has a GPU, else the running Ray cluster or all cores."""
    device: str | None = None
    """Of predicted maps: cpu, cuda, ...; by default the GPU if there is one."""
    max_images: int | None = None
    """Label the first so many images only."""
    overwrite: bool = False
    """Delete what is in the output folder if it was made of other input or options."""
    num_pictures: int = 8
    """How many of the images are drawn as image | truth | label | map, into OUT/panels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        for name in ("checkpoint", "data", "background"):
            _check(bool(getattr(self, name)), name, getattr(self, name), "a text that is not empty")
        _check(self.maps in ("accumulated", "predicted"), "maps", self.maps,
               "'accumulated' or 'predicted'")  # fmt: skip
        _check(bool(self.scales) and min(self.scales) > 0, "scales", self.scales, "above 0, one "
               "at least")  # fmt: skip
        _check(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more")
        _check(self.max_images is None or self.max_images > 0, "max-images", self.max_images,
               "1 or more")  # fmt: skip
        _check(self.num_pictures >= 0, "num-pictures", self.num_pictures, "0 or more")
        others = {name: getattr(self, name) for name in ("data", "truth") if getattr(self, name)}
        for name, path in others.items():
            _check(absolute(str(self.out)) != absolute(path), "out", str(self.out),
                   f"another folder than --{name}")  # fmt: skip


def label(config: LabelConfig, tracker: Tracker | None = None) -> LabelReport:
    """Write the label maps, their pictures and a report; tracker: gets pictures and figures too.

    ValueError for a checkpoint without what is asked for, classes that it does not know, saliency
    that does not fit, or an output folder that holds something else.
    """
    checkpoint = find_checkpoint(absolute(config.checkpoint))
    index = Index.open(absolute(config.data))
    check_source(Source("label", config.data, "labels"), index, len(index.vocabulary))
    check_checkpoint(checkpoint, config)
    if config.saliency is not None:
        check_has_saliency(absolute(config.saliency), index.key(0))
    num_images = min(len(index), config.max_images or len(index))
    classes = choose_classes(index, checkpoint, config.background, num_images)
    tasks = list(_tasks(config, index, checkpoint, classes, num_images))
    options = BuildOptions(config.out, workers=_workers(config), overwrite=config.overwrite)
    shard_tasks = [ShardTask(label_samples, task) for task in tasks]
    built = build_dataset(config.out, classes.vocabulary, shard_tasks, options)
    scores = None
    if config.truth is not None:
        scores = score_pseudo_labels(config.out, absolute(config.truth))
    report = read_report(built, classes.left_out, scores)
    folder = FolderTracker(str(config.out))
    listeners = Trackers([folder, tracker or NullTracker()])
    for number, picture in enumerate(draw_labels(config.out, tasks, config.num_pictures)):
        folder.log_image(f"panels/{number:02d}", picture, checkpoint.step)
        if tracker is not None:  # whose run may have panels of its own
            tracker.log_image(f"labels/{number:02d}", picture, checkpoint.step)
    listeners.log_metrics(report.metrics(), checkpoint.step)
    listeners.log_text("label_report.txt", f"{report}\n")
    if scores is not None:
        listeners.log_text("label_scores.json", json.dumps(scores.to_json(), indent=2) + "\n")
    return report


def check_checkpoint(checkpoint: Checkpoint, config: LabelConfig) -> None:
    """ValueError if it holds no maps, or files that are damaged, or the device is not there."""
    if config.maps == "predicted":
        chosen_device(config.device)
        return  # files are verified where they are opened
    if "maps" not in checkpoint.manifest["memories"]:
        raise ValueError(
            f"{checkpoint.path} holds no accumulated maps, its memories are "
            f"{[*checkpoint.manifest['memories']]}; use --maps predicted, or a run that keeps maps"
        )
    files = checkpoint.manifest["files"]
    checkpoint.verify([name for name in files if name.startswith("memory-maps-")])


def _tasks(
    config: LabelConfig,
    index: Index,
    checkpoint: Checkpoint,
    classes: LabelClasses,
    num_images: int,
) -> Iterator[LabelTask]:
    """One per shard of the input, as far as the images go."""
    digest = derive_seed("checkpoint", json.dumps(checkpoint.manifest, sort_keys=True))
    for start, stop in zip(index.shard_starts[:-1], index.shard_starts[1:], strict=True):
        if start < num_images:
            yield LabelTask(
                checkpoint=checkpoint.path,
                digest=digest,
                data=absolute(config.data),
                start=int(start),
                stop=min(int(stop), num_images),
                maps=config.maps,
                scales=config.scales,
                flip=config.flip,
                device=config.device,
                saliency=config.saliency and absolute(config.saliency),
                fusion=config.fusion,
                to_space=classes.to_space,
                to_output=classes.to_output,
            )


def _workers(config: LabelConfig) -> int | None:
    """A Ray task has no GPU; this process may have one."""
    if config.workers is None and config.maps == "predicted":
        return 0 if chosen_device(config.device).type == "cuda" else None
    return config.workers


def _check(fine: bool, key: str, value: Any, wanted: str) -> None:
    if not fine:
        raise ValueError(f"--{key} is {value!r}; it must be {wanted}")
