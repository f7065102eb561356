"""Sums per class against a confusion matrix, and the groups' means."""

from __future__ import annotations

import json
import math

import pytest
import torch

from memseg_dist.batch import IGNORE
from memseg_dist.evaluation.metrics import (
    EvaluatedClass,
    SegmentationMetrics,
    bucket,
)


def evaluated(groups: str, counts: tuple[int, ...] | None = None) -> list[EvaluatedClass]:
    return [
        EvaluatedClass(
            class_id=index + 10,
            uid=f"n{index}",
            name=f"class {index}",
            group="base" if letter == "b" else "novel",
            training_images=None if counts is None else counts[index],
        )
        for index, letter in enumerate(groups)
    ]


def test_equals_a_confusion_matrix():
    generator = torch.Generator().manual_seed(0)
    metrics = SegmentationMetrics(7)
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    for size in ((5, 9), (16, 3)):
        prediction = torch.randint(0, 6, size, generator=generator)  # class 6 is never predicted
        truth = torch.randint(-1, 6, size, generator=generator)  # nor in the truth
        metrics.update(prediction, truth)
        for guess, right in zip(prediction.flatten(), truth.flatten(), strict=True):
            if right != IGNORE:
                confusion[right, guess] += 1
    scores = metrics.scores(evaluated("bbbnnnn"))
    for index in range(6):
        hits = confusion[index, index].item()
        union = confusion[index].sum() + confusion[:, index].sum() - hits
        assert scores.classes[index].iou == pytest.approx(hits / union.item())
        assert scores.classes[index].pixels == confusion[index].sum()
    assert math.isnan(scores.classes[6].iou)
    expected = torch.tensor([row.iou for row in scores.classes])
    assert scores.miou("all") == pytest.approx(100 * expected.nanmean().item())
    assert scores.miou("base") == pytest.approx(100 * expected[:3].nanmean().item())
    assert scores.miou("novel") == pytest.approx(100 * expected[3:].nanmean().item())
    assert scores.groups["novel"].num_absent == 1 and scores.groups["all"].num_classes == 7
    assert scores.pixel_accuracy == pytest.approx((confusion.trace() / confusion.sum()).item())


def test_predicted_but_not_in_truth_counts_as_zero_not_absent():
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    scores = metrics.scores(evaluated("bn"))
    assert scores.miou("novel") == 0.0 and scores.groups["novel"].num_absent == 0
    assert scores.miou("base") == 50.0


def test_ignored_pixels_do_not_count_even_as_false_positives():
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([0, 1, 1]), torch.tensor([0, IGNORE, IGNORE]))
    assert metrics.scores(evaluated("bn")).groups["novel"].num_absent == 1


def test_all_is_the_weighted_mean_of_base_and_novel():
    metrics = SegmentationMetrics(5)
    generator = torch.Generator().manual_seed(1)
    metrics.update(
        torch.randint(0, 5, (500,), generator=generator),
        torch.randint(0, 5, (500,), generator=generator),
    )
    scores = metrics.scores(evaluated("bbnnn"))
    weighted = (2 * scores.miou("base") + 3 * scores.miou("novel")) / 5
    assert scores.miou() == pytest.approx(weighted)


def test_buckets_by_training_images():
    metrics = SegmentationMetrics(4)
    metrics.update(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]))
    scores = metrics.scores(evaluated("bbnn", (101, 100, 11, 10)))
    assert [row.bucket for row in scores.classes] == ["head", "common", "common", "tail"]
    assert scores.groups["common"].num_classes == 2
    assert [bucket(count) for count in (10, 11, 100, 101)] == ["tail", "common", "common", "head"]
    assert "head" not in metrics.scores(evaluated("bbnn")).groups


def test_results_are_json_and_tables():
    metrics = SegmentationMetrics(3)
    metrics.update(torch.tensor([0, 0]), torch.tensor([0, 0]))
    scores = metrics.scores(evaluated("bbn"))
    data = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert data["groups"]["novel"]["miou"] is None and data["classes"][1]["iou"] is None
    assert scores.metrics("val/") == {
        "val/miou_all": 100.0,
        "val/miou_base": 100.0,
        "val/pixel_accuracy": 100.0,
    }
    assert "novel" in scores.table()
    lines = [line.split(",") for line in scores.class_csv().splitlines()]
    assert [(line[0], line[2]) for line in lines[1:]] == [
        ("class 0", "100.00"), ("class 1", ""), ("class 2", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([0, 3], [0, 0], "prediction holds class indices 0 .. 3"),
        ([0, 0], [0, 255], "truth holds class indices 0 .. 255"),
        ([0], [0, 0], "differ in size"),
    ],
)
def test_bad_values_are_named(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        SegmentationMetrics(3).update(torch.tensor(prediction), torch.tensor(truth))


def test_no_classes_is_an_error():
    with pytest.raises(ValueError, match="0 entries"):
        SegmentationMetrics(0)
