"""Mean intersection over union of a closed vocabulary, from sums per class.

Shape letters: K evaluated classes, numbered 0 .. K - 1 as in the list given to the evaluation.
Three int64 vectors of K are kept, never a K x K matrix; ranks add theirs once, at the end.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import IGNORE

Group = Literal["base", "novel"]


@dataclass(frozen=True, slots=True)
class EvaluatedClass:
    """One class of the test vocabulary.

    class_id: its id in the label space (what the truth masks hold).
    group: "base" classes had masks in training, "novel" ones did not; None: only All counts it.
    training_images: in how many training images it is labelled; None = unknown.
    """

    class_id: int
    uid: str
    name: str
    group: Group | None = None
    training_images: int | None = None


HEAD, TAIL = 100, 10


def bucket(training_images: int) -> str:
    """head: more than HEAD training images; tail: at most TAIL; common: between (as LVIS)."""
    if training_images > HEAD:
        return "head"
    return "tail" if training_images <= TAIL else "common"


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One row of the table; `iou` in 0..1, nan where truth and prediction both lack the class."""

    uid: str
    name: str
    group: Group | None
    bucket: str | None
    iou: float
    pixels: int
    predicted_pixels: int


@dataclass(frozen=True, slots=True)
class GroupScore:
    """`miou`: mean of the classes present x 100 (nan if none); `num_absent` of `num_classes`."""

    miou: float
    num_classes: int
    num_absent: int


@dataclass(frozen=True, slots=True)
class SegmentationScores:
    """`groups` has all; base and novel if classes are so marked; head, common and tail if counts
    of training images are known for all classes, and these are not all of one bucket.
    `pixel_accuracy` is in 0..1."""

    groups: dict[str, GroupScore]
    classes: tuple[ClassScore, ...]
    pixel_accuracy: float

    def miou(self, group: str = "all") -> float:
        return self.groups[group].miou

    def to_json(self) -> dict[str, Any]:
        """Plain values; a nan becomes None, since JSON has no nan."""
        return json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """What a tracker plots: finite numbers only, e.g. {"miou_novel": 20.8}."""
        values = {f"{prefix}miou_{name}": score.miou for name, score in self.groups.items()}
        values[f"{prefix}pixel_accuracy"] = 100 * self.pixel_accuracy
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def table(self) -> str:
        """All / Base / Novel and the buckets, one line each, for a terminal."""
        lines = [f"{'group':<8} {'mIoU':>6} {'classes':>8} {'absent':>7}"]
        for name, score in self.groups.items():
            miou = "-" if math.isnan(score.miou) else f"{score.miou:.2f}"
            lines.append(f"{name:<8} {miou:>6} {score.num_classes:>8} {score.num_absent:>7}")
        return "\n".join(lines)

    def class_csv(self) -> str:
        """One line per class, the best first; IoU in 0..100, empty for absent classes, the last."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "group", "IoU", "pixels", "predicted pixels", "bucket", "uid"])
        for row in sorted(self.classes, key=lambda row: (math.isnan(row.iou), -row.iou, row.name)):
            iou = "" if math.isnan(row.iou) else f"{100 * row.iou:.2f}"
            pixels = row.pixels, row.predicted_pixels
            writer.writerow([row.name, row.group or "", iou, *pixels, row.bucket or "", row.uid])
        return file.getvalue()


class SegmentationMetrics:
    """Running sums over images; `update` is local, `scores` adds all ranks' sums."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        if num_classes < 1:
            raise ValueError(f"nothing to evaluate: the list of classes has {num_classes} entries")
        self.num_classes = num_classes
        self._sums_3K = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """int [...] maps of equal shape, values 0 .. K - 1; `truth` may be IGNORE.

        Errors: ValueError for a value outside of the vocabulary, or for maps of unequal shape.
        """
        if prediction.shape != truth.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} differ in "
                "size; resize the logits to the truth's size before the argmax"
            )
        counted = truth != IGNORE
        prediction, truth = prediction[counted].long(), truth[counted].long()
        for what, values in (("truth", truth), ("prediction", prediction)):
            if values.numel() == 0:
                continue
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{what} holds class indices {low} .. {high}, but {self.num_classes} classes "
                    f"are evaluated (0 .. {self.num_classes - 1}; {IGNORE} in the truth = ignored)"
                )
        hits = truth[prediction == truth]
        for row, values in enumerate((hits, prediction, truth)):
            self._sums_3K[row] += torch.bincount(values, minlength=self.num_classes)

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Intersections, unions and target pixels: int64 [K] on the host, summed over ranks.

        A collective. It leaves the running sums as they are.
        """
        intersections, predicted, target = dist.all_reduce_sum(self._sums_3K.clone()).cpu()
        return intersections, predicted + target - intersections, target

    def scores(self, classes: Sequence[EvaluatedClass]) -> SegmentationScores:
        """IoU per class and per group. A collective."""
        if len(classes) != self.num_classes:
            raise ValueError(f"{len(classes)} class names for {self.num_classes} evaluated classes")
        intersections, unions, target = self.totals()
        iou = (intersections.double() / unions.double()).tolist()  # 0 / 0 = nan: absent
        predicted = unions - target + intersections
        rows = tuple(
            ClassScore(
                item.uid,
                item.name,
                item.group,
                None if item.training_images is None else bucket(item.training_images),
                *figures,
            )
            for item, *figures in zip(classes, iou, target.tolist(), predicted.tolist())
        )
        groups = {"all": group_score(rows)}
        if any(row.group is not None for row in rows):
            for name in ("base", "novel"):
                groups[name] = group_score([row for row in rows if row.group == name])
        buckets = {row.bucket for row in rows}
        if None not in buckets and len(buckets) > 1:  # the only one would repeat All
            for name in ("head", "common", "tail"):
                groups[name] = group_score([row for row in rows if row.bucket == name])
        num_pixels = int(target.sum())
        accuracy = int(intersections.sum()) / num_pixels if num_pixels else math.nan
        return SegmentationScores(groups, rows, accuracy)


def group_score(rows: Sequence[ClassScore]) -> GroupScore:
    present = [row.iou for row in rows if not math.isnan(row.iou)]
    miou = 100 * sum(present) / len(present) if present else math.nan
    return GroupScore(miou, len(rows), len(rows) - len(present))
