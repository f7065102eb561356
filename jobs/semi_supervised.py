"""What the jobs that learn from few masks share: their splits, and the recipes to compare with.

    --recipe method          the paper's, on the images of the split and on all images
    --recipe supervised      the same network on the images of the split alone
    --recipe self-training   that network labels all images where its probability is 0.5 or more;
                             the same network learns from the masks and from these labels

Every network has as many steps in each recipe. Splits are made by `memseg data split`; a run
without --split takes every mask there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from memseg_dist.config import LaunchConfig, RunConfig
from memseg_dist.data.loader import Source
from memseg_dist.methods.labeller import ArgmaxLabeller
from memseg_dist.methods.method import MethodConfig
from memseg_dist.pipeline import PipelineOptions
from memseg_dist.stages import LabelConfig, Stage, result

CONFIDENT = 0.5
"""Probability from which offline self-training believes its teacher."""


@dataclass(frozen=True)
class SemiOptions(PipelineOptions):
    """Segmentation from few masks."""

    split: str | None = None
    """The images whose masks are used: a split's name, as 1_16-seed0, or a file of keys."""
    recipe: Literal["method", "supervised", "self-training"] = "method"
    """The method of the paper, or what it is compared with."""
    launch: LaunchConfig = LaunchConfig(workers=(1, 2))

    def name_of(self, method: str, data: str) -> str:
        """Of the first run on `data`."""
        split = "" if self.split is None else "_" + self.split.split("/")[-1].removesuffix(".txt")
        kind = method if self.recipe == "method" else self.recipe.replace("-", "_")
        return self.name or f"{kind}_{data}{split}"


def pseudo_labels(
    options: PipelineOptions,
    of: str,
    source: Source,
    *,
    threshold: float = 0.0,
    truth: str | None = None,
) -> LabelConfig:
    """The stage in which the result of the stage `of` labels all images of `source`: each pixel
    with its most probable class, unknown where its probability is below the threshold.
    """
    return LabelConfig(
        checkpoint=result(of),
        data=source.path,
        out=result(of) + "/labels",
        labeller=ArgmaxLabeller(threshold=threshold, restrict_to_labels=False),
        truth=truth,
        workers=0 if options.launch.launcher == "local" else None,
    )


def supervised(run: RunConfig, method: MethodConfig, sources: Sequence[Source]) -> RunConfig:
    """`run` on sources with masks alone, with no more workers than they have slots."""
    slots = sum(source.slots for source in sources)
    low, high = run.launch.workers_range
    workers = (min(low, slots), min(high, slots))
    launch = replace(run.launch, workers=workers if low < high else workers[1])
    return replace(run, method=method, sources=tuple(sources), launch=launch)


def self_training(
    options: PipelineOptions, run: RunConfig, method: MethodConfig, *, truth: str | None = None
) -> dict[str, Stage]:
    """Offline: a supervised teacher, its labels of all images, and a student on both.

    run: the paper's, whose sources are those with masks and, last, all images. method: the
    supervised network.
    """
    *labelled, everything = run.sources
    pseudo = replace(
        everything, path=result("labels"), supervision="masks", hide_mask=False, pseudo_masks=None
    )
    student = supervised(run, method, [*labelled, pseudo])
    return {
        "teacher": supervised(run, method, labelled),
        "labels": pseudo_labels(options, "teacher", everything, threshold=CONFIDENT, truth=truth),
        "student": replace(student, name=f"{run.name}_student"),
    }
