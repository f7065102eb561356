"""Scores of pseudo labels against sums done by hand, in both readings of unknown pixels."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.pseudo_labels.scores import ids_in_truth, score_pseudo_labels
from memseg_dist.tools.shards import Sample, finish, write_shard

UNKNOWN = 65535
BACKGROUND, CAT, DOG, COW = (Category(name, name) for name in ("background", "cat", "dog", "cow"))
TRUTH = Vocabulary((DOG, BACKGROUND, CAT, COW))
PSEUDO = Vocabulary((BACKGROUND, CAT, COW))


def write(root, vocabulary, masks):
    def samples():
        for key, mask in masks.items():
            values = None if mask is None else np.array(mask, np.uint16)
            height, width = (2, 4) if values is None else values.shape
            file = io.BytesIO()
            Image.new("RGB", (width, height)).save(file, "png")
            yield Sample(key, file.getvalue(), "png", (0,), values)

    write_shard(root, 0, samples(), num_classes=len(vocabulary))
    finish(root, vocabulary)
    return root


@pytest.fixture
def truth(tmp_path):
    """dog 0, background 1, cat 2; no cow is seen."""
    masks = {
        "a": [[1, 1, 2, 2], [1, 1, 2, UNKNOWN]],
        "b": [[0, 0, 1, 1], [0, 0, 1, UNKNOWN]],
        "only-labels": None,
        "elsewhere": [[0]],
    }
    return write(tmp_path / "truth", TRUTH, masks)


@pytest.fixture
def pseudo(tmp_path):
    """background 0, cat 1, cow 2, in another order of keys."""
    masks = {
        "b": [[UNKNOWN, 1, 0, 0], [UNKNOWN, 2, 0, 0]],
        "a": [[0, 1, 1, UNKNOWN], [0, 0, 1, 1]],
        "only-labels": [[0, 0, 0, 0], [0, 0, 0, 0]],
        "new": [[0]],
    }
    return write(tmp_path / "pseudo", PSEUDO, masks)


def test_against_a_hand_computation(pseudo, truth, tmp_path):
    scores = score_pseudo_labels(pseudo, truth, cache_dir=tmp_path / "cache", show_progress=False)
    assert scores.num_images == 2 and scores.num_without_truth == 2
    assert scores.share_unknown == pytest.approx(3 / 14)
    # Known truth: 4 dog, 7 background, 3 cat. Background: 6 hits, 1 taken for cat.
    # Cat: 2 hits, 1 unknown; predicted 4 times where the truth is known: 2 + 1 + 1 (on dog).
    # Dog: 2 unknown, 1 taken for cat, 1 for cow, of which there is none.
    parts = {"dog": 0, "background": 6 / 7, "cow": 0}
    assert iou(scores.excluded) == pytest.approx(parts | {"cat": 2 / 4})
    assert iou(scores.wrong) == pytest.approx(parts | {"cat": 2 / 5})
    assert scores.excluded.miou() == pytest.approx(100 * (6 / 7 + 2 / 4) / 4)
    assert scores.wrong.miou() == pytest.approx(100 * (6 / 7 + 2 / 5) / 4)
    assert scores.excluded.pixel_accuracy == pytest.approx(8 / 11)
    assert scores.wrong.pixel_accuracy == pytest.approx(8 / 14)
    assert "33.93 with unknown pixels excluded, 31.43 with them counted as wrong" in str(scores)
    assert scores.metrics("x/")["x/miou_unknown_wrong"] == scores.wrong.miou()
    assert scores.to_json()["unknown_excluded"]["groups"]["all"]["num_classes"] == 4


def test_only_what_is_scored_is_read_row_by_row(truth, tmp_path, monkeypatch):
    pseudo = write(tmp_path / "one", PSEUDO, {"a": [[0, 1, 1, UNKNOWN], [0, 0, 1, 1]]})
    asked, row = [], Index.row
    monkeypatch.setattr(
        Index, "row", lambda self, number: asked.append(number) or row(self, number)
    )
    score_pseudo_labels(pseudo, truth, cache_dir=tmp_path / "cache", show_progress=False)
    assert len(asked) == 2


def iou(scores) -> dict[str, float]:
    return {row.name: row.iou for row in scores.classes}


def test_the_truth_scores_100(truth, tmp_path):
    scores = score_pseudo_labels(truth, truth, cache_dir=tmp_path / "cache", show_progress=False)
    assert scores.excluded.miou() == scores.wrong.miou() == 100
    assert scores.share_unknown == 0 and scores.num_images == 3 and scores.num_without_truth == 1


@pytest.mark.parametrize("uid", ["name:background", "bg"])
def test_a_class_of_another_uid_is_found_by_its_name(pseudo, truth, tmp_path, uid):
    """Class lists used to give the background the uid "name:background"."""
    named = (replace(BACKGROUND, uid=uid, name="Background"), replace(CAT, uid="n02121808"))
    Vocabulary((DOG, *named, COW)).save(truth / "vocabulary.json")
    scores = score_pseudo_labels(pseudo, truth, cache_dir=tmp_path / "cache", show_progress=False)
    found = {"dog": 0, "Background": 6 / 7, "cat": 2 / 4, "cow": 0}
    assert iou(scores.excluded) == pytest.approx(found)


def test_a_name_of_several_classes_says_nothing():
    crane, bird = Category("n1", "crane"), Category("n2", "crane")
    machine = Category("name:crane", "crane")
    for written, truth in (([machine], [crane, bird]), ([crane, bird], [machine])):
        with pytest.raises(ValueError, match=r"truth here: . of the . classes .* \(crane"):
            ids_in_truth(Vocabulary(tuple(written)), Vocabulary(tuple(truth)), "here")
    by_uid = ids_in_truth(Vocabulary((bird, machine)), Vocabulary((machine, bird)), "here")
    assert by_uid.tolist() == [1, 0]


def test_all_unknown_is_nothing_or_all_wrong(truth, tmp_path):
    blank = write(tmp_path / "blank", PSEUDO, {"a": np.full((2, 4), UNKNOWN)})
    scores = score_pseudo_labels(blank, truth, show_progress=False)
    assert math.isnan(scores.excluded.miou()) and scores.wrong.miou() == 0
    assert scores.share_unknown == 1


def test_what_cannot_be_compared(truth, tmp_path):
    other = write(tmp_path / "other", PSEUDO, {"z": [[0]], "y": [[1]]})
    with pytest.raises(ValueError, match=r"no image in common: keys such as 'z' and 'a'"):
        score_pseudo_labels(other, truth, show_progress=False)
    strange = Vocabulary((CAT, Category("n1", "ox")))
    strange = write(tmp_path / "strange", strange, {"a": np.zeros((2, 4))})
    with pytest.raises(ValueError, match=r"truth: 1 of the 2 classes .* such as \['n1'\] \(ox\)"):
        score_pseudo_labels(strange, truth, show_progress=False)
    small = write(tmp_path / "small", PSEUDO, {"a": [[0]]})
    with pytest.raises(ValueError, match=r"image 'a': the pseudo label has \(1, 1\) pixels"):
        score_pseudo_labels(small, truth, show_progress=False)
