"""Score a method on a validation set: All / Base / Novel mIoU, sharded over the ranks.

Image i is segmented by rank i mod W; integers are added up at the end, so any number of ranks gives
identical totals. Every class of the test vocabulary competes for every pixel, and no other class.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from memseg_dist import dist
from memseg_dist.batch import IGNORE
from memseg_dist.data.loader_process import (
    TIMEOUT_S,
    next_item,
    process_options,
    starting_loader_processes,
)
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.evaluation.metrics import (
    EvaluatedClass,
    Group,
    SegmentationMetrics,
    SegmentationScores,
)
from memseg_dist.evaluation.sliding import SLIDE, Inference, segment
from memseg_dist.methods.method import Method, evaluation_mode

Item = tuple[Tensor, Tensor, str, Sequence[int]]
"""image uint8 [3, Y, X]; truth int64 [H, W] of label-space ids or IGNORE; key; labels."""


class EvaluationImages(Protocol):
    """A validation set: `data.loader.EvalDataset`, or any sequence of items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


@dataclass(frozen=True)
class EvaluationResult:
    scores: SegmentationScores
    num_images: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "num_images": self.num_images,
            "seconds": round(self.seconds, 3),
            **self.scores.to_json(),
        }

    def table(self) -> str:
        return f"{self.num_images} images in {self.seconds:.1f} s\n{self.scores.table()}"


def evaluated_classes(
    label_space: LabelSpace,
    source: str,
    *,
    base: Collection[str] = (),
    novel: Collection[str] = (),
    exclude: Collection[str] = (),
    training_images: np.ndarray | None = None,
) -> list[EvaluatedClass]:
    """The classes of `source`, ascending by label-space id, without the uids in `exclude`.

    base, novel: uids that score as such; a class in neither counts in All alone.
    training_images: per label-space id, the training images that are labelled with it.
    Errors: ValueError naming a uid that is no class of `source`, or that is given as both.
    """
    vocabulary = label_space.vocabulary
    ids = [class_id for class_id in label_space.classes(source).tolist() if class_id != IGNORE]
    uids = [vocabulary.categories[class_id].uid for class_id in ids]
    known, excluded = {*uids}, {*exclude}
    for what, given in (("base", base), ("novel", novel), ("exclude", exclude)):
        for uid in given:
            if uid not in known:
                near = difflib.get_close_matches(uid, uids, n=3)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise ValueError(
                    f"{what}: {uid!r} is no class of the evaluated set '{source}' "
                    f"({len(uids)} classes){hint}"
                )
    both = sorted(set(base) & set(novel))
    if both:
        raise ValueError(f"{both[0]!r} is given as a base and as a novel class; keep one")
    group: dict[str, Group] = {**dict.fromkeys(base, "base"), **dict.fromkeys(novel, "novel")}
    return [
        EvaluatedClass(
            class_id=class_id,
            uid=uid,
            name=vocabulary.categories[class_id].name,
            group=group.get(uid),
            training_images=None if training_images is None else int(training_images[class_id]),
        )
        for class_id, uid in zip(ids, uids, strict=True)
        if uid not in excluded
    ]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is evaluated: a method on the images of a validation set; each rank has a share of them.

    Truth outside `classes` is not counted. max_images: the first so many are scored, pictures may
    show others. num_processes: loader processes per rank that read ahead; they must be able to
    import the class of `dataset`, which cannot be one of the script.
    """

    method: Method
    dataset: EvaluationImages
    classes: Sequence[EvaluatedClass]
    device: torch.device | str
    _: KW_ONLY
    inference: Inference = SLIDE
    max_images: int | None = None
    num_processes: int = 0
    show_progress: bool = True

    @cached_property
    def class_ids(self) -> Tensor:
        """Of the classes in the label space, [K] on the device."""
        return torch.tensor([item.class_id for item in self.classes], device=self.device)

    @cached_property
    def num_images(self) -> int:
        num_images = len(self.dataset)
        num_images = num_images if self.max_images is None else min(self.max_images, num_images)
        if num_images == 0:
            raise ValueError("nothing to evaluate: the validation set has no images")
        return num_images

    def images(self) -> Iterator[tuple[Tensor, Tensor, str]]:
        """This rank's image, truth as positions in `class_ids` (both on the device), and key.

        With a progress bar on rank 0.
        """
        indices = range(dist.rank(), self.num_images, dist.size())
        own: Any = Subset(self.dataset, indices)  # type: ignore[arg-type]
        options = process_options(self.num_processes, TIMEOUT_S)
        with starting_loader_processes(self.num_processes):
            items = iter(DataLoader(own, batch_size=None, collate_fn=tuple, **options))
        names = (f"image {index} of the validation set".__str__ for index in indices)
        named = (next_item(items, name) for name in names)
        hidden, console = not self.show_progress or dist.rank() != 0, Console(stderr=True)
        for image, truth, key, _ in track(
            named, "evaluating", len(indices), console=console, disable=hidden
        ):
            truth = to_evaluated(truth.to(self.device), self.class_ids)
            yield image.to(self.device, non_blocking=True), truth, key


def evaluate(evaluation: Evaluation) -> EvaluationResult:
    """Segment every image over the classes and compare. A collective: the same on all ranks.

    Errors: ValueError for an empty set or class list, naming the image where a map does not fit.
    """
    started = time.monotonic()
    metrics = SegmentationMetrics(len(evaluation.classes), evaluation.device)
    with evaluation_mode(evaluation.method):
        for image, truth, key in evaluation.images():
            out_size = (truth.shape[-2], truth.shape[-1])
            prediction = segment(
                evaluation.method.predict,
                image,
                evaluation.class_ids,
                evaluation.inference,
                out_size,
            )
            try:
                metrics.update(prediction, truth)
            except ValueError as error:
                raise ValueError(f"image {key!r}: {error}") from error
    scores = metrics.scores(evaluation.classes)
    return EvaluationResult(scores, evaluation.num_images, time.monotonic() - started)


def to_evaluated(truth: Tensor, class_ids: Tensor) -> Tensor:
    """Label-space ids -> their positions in `class_ids` [K]; what is not among them -> IGNORE."""
    lookup = torch.full((int(class_ids.max()) + 1,), IGNORE, device=truth.device)
    lookup[class_ids] = torch.arange(len(class_ids), device=truth.device)
    known = (truth >= 0) & (truth < len(lookup))
    return torch.where(known, lookup[truth.clamp(0, len(lookup) - 1)], IGNORE)
