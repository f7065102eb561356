"""The road from image labels to a segmenter, as three runs of one job.

    classifier   trains activation maps and accumulates them          STORAGE/NAME
    labels       maps -> pseudo masks, written as shards              STORAGE/NAME/labels
    segmenter    an ordinary run on those shards                      STORAGE/NAME_segmenter

Each run resumes where it was, so a job that was stopped is started again by the same command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from memseg_dist.config import RunConfig
from memseg_dist.data.files import exists, join
from memseg_dist.data.index import Index
from memseg_dist.data.saliency import check_has_saliency
from memseg_dist.data.schema import INDEX_NAME
from memseg_dist.evaluation.fusion import FusionConfig
from memseg_dist.methods.rca_config import RCAConfig, released
from memseg_dist.runtime.api import NullTracker, Tracker
from memseg_dist.runtime.jobs import Job
from memseg_dist.runtime.label import LabelConfig, label
from memseg_dist.runtime.launch import build_mlflow, launch, provenance

Station = Literal["classifier", "labels", "segmenter"]
BACKGROUND = "background"
"""Uid of the background class in the recipes' vocabularies."""


@dataclass(frozen=True)
class Road(Job):
    """RCA from image labels to a segmenter."""

    preset: Literal["paper", "released"] = "paper"
    """Choices where the paper and its public code differ; see methods/rca.py."""
    baseline: bool = False
    """The classifier without memory: the same maps, fusion and segmenter."""
    saliency: str | None = None
    """Folder of saliency maps KEY.png (8 bit, of the images' sizes) for the pseudo masks."""
    eps: bool = False
    """Train with the saliency-supervised loss of EPS as well; needs --saliency."""
    truth: str | None = None
    """Shards with masks of the training images, to score the pseudo masks; by default those of the
    recipe, where it writes some."""
    relabel: bool = False
    """Write the pseudo masks anew, if they were made of other maps, saliency or rules."""
    label_workers: int | None = None
    """Parallel tasks of the labelling on this machine; 0: in this process. By default the Ray
    cluster, with --launch.launcher local this process. The CRF takes about a second per image."""
    until: Station = "segmenter"
    """The last of the three runs to make."""

    def method(self, config: RCAConfig) -> RCAConfig:
        """`config` as the options say."""
        config = released(config) if self.preset == "released" else config
        if self.baseline:
            config = replace(config, contrast_weight=0.0, aggregation="off", noise=False)
        return replace(config, saliency_weight=1.0) if self.eps else config

    def fusion(self) -> FusionConfig:
        """How maps become masks; the same for the baseline."""
        return FusionConfig()

    def segmenter(self, config: RunConfig, labels: str) -> RunConfig:
        """The run on the shards `labels`, from the classifier's config."""
        raise NotImplementedError

    def stages(self, config: RunConfig) -> Mapping[str, RunConfig]:
        segmenter = self.segmenter(config, labels_of(config))
        segmenter = replace(segmenter, name=f"{config.name}_segmenter")
        return {"segmenter": _shrunk_like(config, segmenter) if self.smoke else segmenter}

    def truth_of(self, config: RunConfig) -> str | None:
        """Shards to score the pseudo masks against, if there are any."""
        return None if self.smoke else self.truth

    def prepare(self, config: RunConfig) -> None:
        """What would fail after days of training fails now."""
        if self.eps and self.saliency is None:
            raise ValueError("--eps needs --saliency: the folder of the images' saliency maps")
        if self.until == "classifier":
            return
        if "://" in config.storage:
            raise ValueError(
                f"--storage {config.storage} is a URL, which the pseudo masks cannot be written "
                "to; use a shared folder, or --until classifier and then `memseg label`"
            )
        truth = self.truth_of(config)
        if truth is not None and not exists(join(truth, INDEX_NAME)):
            raise ValueError(
                f"--truth {truth}: no shards there to score the pseudo masks against; write them "
                "with the recipe, or name others"
            )
        if self.saliency is not None:
            first = Index.open(config.sources[0].path, config.cache_directory).key(0)
            check_has_saliency(self.saliency, first)

    def finish(
        self, config: RunConfig, result: Mapping[str, Any], stages: Mapping[str, RunConfig]
    ) -> None:
        if self.until == "classifier":
            return
        # the classifier's own MLflow run goes on
        is_tracked = config.tracking.kind == "mlflow"
        tracker: Tracker = build_mlflow(config, provenance()) if is_tracked else NullTracker()
        workers = self.label_workers
        if workers is None and config.launch.launcher == "local":
            workers = 0
        try:
            report = label(
                LabelConfig(
                    checkpoint=result["checkpoint"],
                    data=config.sources[0].path,
                    out=Path(labels_of(config)),
                    saliency=self.saliency,
                    truth=self.truth_of(config),
                    fusion=self.fusion(),
                    workers=workers,
                    overwrite=self.relabel,
                ),
                tracker,
            )
        except BaseException:
            tracker.finish("failed")
            raise
        tracker.finish("finished")
        print(report, flush=True)
        if report.counts.share_unknown == 1 and not self.smoke:
            raise ValueError(
                f"every pixel of the pseudo masks in {labels_of(config)} is unknown: there is "
                "nothing to train a segmenter on; train the classifier longer, or look at its maps"
            )
        if self.until == "segmenter":
            launch(stages["segmenter"])


def labels_of(config: RunConfig) -> str:
    """Where the pseudo masks of the classifier `config` go."""
    return f"{config.directory}/labels"


def _shrunk_like(small: RunConfig, run: RunConfig) -> RunConfig:
    """`run` at the size of another that is a `--smoke` already."""
    augment = small.sources[0].augment
    sources = tuple(
        replace(source, augment=replace(source.augment, crop=augment.crop, resize=augment.resize))
        for source in run.sources
    )
    validation = small.validation and replace(small.validation, exclude=())
    return replace(
        run,
        sources=sources,
        validation=validation,
        backbone=small.backbone,
        steps=small.steps,
        every=small.every,
        launch=small.launch,
        loader=small.loader,
    )
