"""Whole evaluation: what is counted, on any number of ranks, and what is drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation.stand_in import FIRST_ID, NUM_CLASSES, ColorMethod, Images, evaluated
from reference.sliding import segment_dense

from memseg_dist.batch import IGNORE
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.evaluation.evaluate import Evaluation, evaluate, evaluated_classes, to_evaluated
from memseg_dist.evaluation.metrics import SegmentationMetrics
from memseg_dist.evaluation.sliding import Inference
from memseg_dist.tools.pictures.draw import choose_images, draw_panels


def run(num_images: int = 5, num_processes: int = 0) -> dict:
    evaluation = Evaluation(
        ColorMethod(),
        Images(num_images),
        evaluated(),
        "cpu",
        inference=Inference(window=16, stride=10),
        num_processes=num_processes,
        show_progress=False,
    )
    result = evaluate(evaluation)
    return {key: value for key, value in result.to_json().items() if key != "seconds"}


def test_equals_a_plain_loop():
    method, images = ColorMethod().eval(), Images()
    metrics = SegmentationMetrics(NUM_CLASSES)
    ids = torch.arange(FIRST_ID, FIRST_ID + NUM_CLASSES)
    for index in range(len(images)):
        image, truth, _, _ = images[index]
        with torch.no_grad():
            label = segment_dense(
                method.predict, image, ids, Inference(window=16, stride=10), tuple(truth.shape)
            )
        target = truth - FIRST_ID
        target[(truth == IGNORE) | (target == NUM_CLASSES)] = IGNORE
        metrics.update(label, target)
    expected = metrics.scores(evaluated()).to_json()
    found = run()
    assert found.pop("num_images") == 5
    assert found == expected
    assert any(row["iou"] for row in found["classes"])


@pytest.mark.parametrize("world_size", [2])
def test_ranks_give_identical_totals(process_pool, world_size):
    """5 images on 2 ranks: unequal shares; and 1 image, so that a rank has none."""
    for num_images in (5, 1):
        assert process_pool(world_size).run(run, num_images) == [run(num_images)] * world_size


def test_loader_processes_change_nothing():
    assert run(3, num_processes=1) == run(3)


def test_max_images():
    evaluation = Evaluation(ColorMethod(), Images(), evaluated(), "cpu", max_images=2)
    result = evaluate(evaluation)
    assert result.num_images == 2 and "2 images" in result.table()
    assert json.dumps(result.to_json(), allow_nan=False)


def test_modes_and_gradients_are_left_as_found():
    method = ColorMethod()
    method.norm.eval()
    statistics = method.norm.running_mean.clone()
    evaluate(Evaluation(method, Images(1), evaluated(), "cpu", show_progress=False))
    assert method.training and not method.norm.training
    assert torch.equal(method.norm.running_mean, statistics)
    assert method.table.grad is None and torch.is_grad_enabled()


def test_excluded_and_unknown_ids_are_ignored():
    truth = torch.tensor([[7, 2, IGNORE], [5, 100, 0]])
    expected = torch.tensor([[1, IGNORE, IGNORE], [0, IGNORE, IGNORE]])
    assert torch.equal(to_evaluated(truth, torch.tensor([5, 7])), expected)


def test_errors_name_the_image_and_the_fix():
    with pytest.raises(ValueError, match="no images"):
        evaluate(Evaluation(ColorMethod(), Images(0), evaluated(), "cpu"))
    with pytest.raises(ValueError, match="0 entries"):
        evaluate(Evaluation(ColorMethod(), Images(), [], "cpu"))


@pytest.fixture
def label_space() -> LabelSpace:
    animals = Vocabulary((Category("n1", "dog"), Category("n2", "cat"), Category("n3", "cow")))
    things = Vocabulary((Category("n9", "chair"), Category("n2", "cat")))
    return LabelSpace.union({"things": things, "animals": animals})


def test_classes_are_those_of_the_evaluated_set(label_space):
    counts = np.array([5, 6, 7, 8])
    classes = evaluated_classes(
        label_space, "animals", base=["n2"], novel=["n1"], exclude=["n3"], training_images=counts
    )
    assert [(item.uid, item.group, item.training_images) for item in classes] == [
        ("n2", "base", 6),
        ("n1", "novel", 7),
    ]
    assert [item.group for item in evaluated_classes(label_space, "animals")] == [None] * 3


class CountingUid(str):
    num_compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountingUid.num_compared += 1
        return str.__eq__(self, other)


def test_many_classes_cost_their_number():
    uids = [CountingUid(f"n{number}") for number in range(1000)]
    vocabulary = Vocabulary(tuple(Category(str(uid), str(uid)) for uid in uids))
    space = LabelSpace.union({"all": vocabulary})
    CountingUid.num_compared = 0
    evaluated_classes(space, "all", base=uids[:500], novel=uids[500:900], exclude=uids[900:])
    assert CountingUid.num_compared < 10 * len(uids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": ["n22"]}, "base: 'n22' is no class of the evaluated set 'animals'.*nearest"),
        ({"exclude": ["n9"]}, "exclude: 'n9'"),
        ({"base": ["n1"], "novel": ["n1"]}, "'n1' is given as a base and as a novel class"),
    ],
)
def test_wrong_uids_are_named(label_space, options, message):
    with pytest.raises(ValueError, match=message):
        evaluated_classes(label_space, "animals", **options)


def test_panels_show_novel_classes_first():
    images, classes = Images(8), evaluated()
    chosen = choose_images(images, classes, 3)
    assert len(chosen) == 3 and chosen == choose_images(images, classes, 3)
    assert all(classes[focus].group == "novel" for _, focus in chosen)
    assert {focus for _, focus in chosen} == {4, 5}
    inference = Inference(window=16, stride=16)
    drawn = draw_panels(Evaluation(ColorMethod(), images, classes, "cpu", inference=inference), 2)
    assert [key for key, _ in drawn] == [images[index][2] for index, _ in chosen[:2]]
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for _, picture in drawn)
