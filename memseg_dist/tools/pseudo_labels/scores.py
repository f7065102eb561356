"""How good pseudo labels are, against the masks of the same images.

A published figure can hang on what becomes of the pixels that a label map leaves unknown, so both
readings are given: they are not counted at all, or each counts as a miss of its true class (part of
that class's union, of no intersection). Truth that is unknown is never counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from memseg_dist.batch import IGNORE
from memseg_dist.data.cache import DEFAULT_CACHE_BYTES, ShardCache
from memseg_dist.data.files import default_cache
from memseg_dist.data.index import Index
from memseg_dist.data.reader import Reader
from memseg_dist.data.vocabulary import BACKGROUND, Category, Vocabulary, fold, is_background
from memseg_dist.evaluation.metrics import (
    EvaluatedClass,
    SegmentationMetrics,
    SegmentationScores,
    group_score,
)


@dataclass(frozen=True)
class PseudoScores:
    """excluded, wrong: the scores with unknown pixels left out, and with them counted as wrong.

    share_unknown: of the pixels with known truth, 0..1. num_without_truth: label maps whose key has
    no mask to compare with.
    """

    excluded: SegmentationScores
    wrong: SegmentationScores
    share_unknown: float
    num_images: int
    num_without_truth: int

    def __str__(self) -> str:
        missing = f", {self.num_without_truth} more have none" if self.num_without_truth else ""
        return (
            f"pseudo labels against the masks of {self.num_images} images{missing}\n"
            f"  mIoU {self.excluded.miou():.2f} with unknown pixels excluded, "
            f"{self.wrong.miou():.2f} with them counted as wrong "
            f"({100 * self.share_unknown:.2f} % of the pixels are unknown)"
        )

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """What a tracker plots."""
        return {
            f"{prefix}miou_unknown_excluded": self.excluded.miou(),
            f"{prefix}miou_unknown_wrong": self.wrong.miou(),
            f"{prefix}unknown_percent": 100 * self.share_unknown,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "num_images": self.num_images,
            "num_without_truth": self.num_without_truth,
            "share_unknown": self.share_unknown,
            "unknown_excluded": self.excluded.to_json(),
            "unknown_wrong": self.wrong.to_json(),
        }


def score_pseudo_labels(
    pseudo_path: str | Path,
    truth_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
) -> PseudoScores:
    """Compare the masks of two shard folders, joined by key and by class: see `ids_in_truth`.

    Scored are the classes of the truth's vocabulary, the background among them. ValueError if no
    key is in both, if the truth lacks a class, or if the two masks of an image differ in size.
    """
    cache = Path(cache_dir or default_cache())
    pseudo, truth = Index.open(pseudo_path, cache), Index.open(truth_path, cache)
    vocabulary = truth.vocabulary
    other = len(vocabulary)  # what is predicted where the label is unknown
    to_truth = ids_in_truth(pseudo.vocabulary, vocabulary, str(truth_path))
    shards = ShardCache(cache / "shards", DEFAULT_CACHE_BYTES)
    predictions = Reader(pseudo, shards, to_truth)
    truths = Reader(truth, shards, np.arange(other, dtype=np.int32))
    pairs = _common_rows(pseudo, truth)
    if not pairs:
        raise ValueError(
            f"{pseudo_path} and {truth_path} have no image in common: keys such as "
            f"{pseudo.key(0)!r} and {truth.key(0)!r}; score against masks of the same images"
        )
    excluded, wrong = SegmentationMetrics(other + 1), SegmentationMetrics(other + 1)
    num_known = num_unknown = 0
    console = Console(stderr=True)
    for row, true_row in track(pairs, "scoring", console=console, disable=not show_progress):
        predicted, target = predictions.read_mask(row), truths.read_mask(true_row)
        if predicted.shape != target.shape:
            raise ValueError(
                f"image {pseudo.key(row)!r}: the pseudo label has {tuple(predicted.shape)} pixels, "
                f"the truth {tuple(target.shape)}; write both at the image's size"
            )
        is_unknown = predicted == IGNORE
        num_known += int((target != IGNORE).sum())
        num_unknown += int((is_unknown & (target != IGNORE)).sum())
        predicted = predicted.masked_fill(is_unknown, other)
        wrong.update(predicted, target)
        excluded.update(predicted, target.masked_fill(is_unknown, IGNORE))
    classes = [
        EvaluatedClass(index, item.uid, item.name)
        for index, item in enumerate(vocabulary.categories)
    ]
    return PseudoScores(
        excluded=_scores(excluded, classes),
        wrong=_scores(wrong, classes),
        share_unknown=num_unknown / max(num_known, 1),
        num_images=len(pairs),
        num_without_truth=len(pseudo) - len(pairs),
    )


def ids_in_truth(written: Vocabulary, truth: Vocabulary, where: str) -> NDArray[np.int32]:
    """int32 [written classes]: the truth's class of the same uid, else the only one of the name.

    ValueError naming `where`, the truth, if there is no such class.
    """
    left = [item for item in truth.categories if item.uid not in written]
    others = [item for item in written.categories if item.uid not in truth]
    num_of = Counter(map(_name_of, [*left, *others]))
    uids = {_name_of(item): item.uid for item in left}
    same = {item.uid: uids[_name_of(item)] for item in others
            if _name_of(item) in uids and num_of[_name_of(item)] == 2}  # fmt: skip
    unknown = [item for item in others if item.uid not in same]
    if unknown:
        names = ", ".join(item.name for item in unknown[:3])
        raise ValueError(
            f"truth {where}: {len(unknown)} of the {len(written)} classes of the pseudo labels are "
            f"unknown to it, such as {[item.uid for item in unknown[:3]]} ({names}); give its "
            "vocabulary.json the uids of the training sets"
        )
    return np.array([truth.index(same.get(uid, uid)) for uid in written.uids], dtype=np.int32)


def _name_of(item: Category) -> str:
    return BACKGROUND if is_background(item.uid) else fold(item.name)


def _common_rows(pseudo: Index, truth: Index) -> list[tuple[int, int]]:
    """(row of `pseudo`, row of `truth`) of the keys that have a mask in both."""
    rows = np.flatnonzero(pseudo.numbers("mask_size"))
    true_rows = truth.rows_of([*pseudo.all_keys()])[rows]
    is_common = (true_rows >= 0) & (truth.numbers("mask_size")[true_rows] > 0)
    return [*zip(rows[is_common].tolist(), true_rows[is_common].tolist(), strict=True)]


def _scores(metrics: SegmentationMetrics, classes: list[EvaluatedClass]) -> SegmentationScores:
    """Of the classes alone: the last index, of everything else, is no class."""
    rest = EvaluatedClass(len(classes), "", "no scored class")
    scores = metrics.scores([*classes, rest])
    rows = scores.classes[:-1]
    return SegmentationScores({"all": group_score(rows)}, rows, scores.pixel_accuracy)
