"""COCO-Stuff on a miniature of the official folders, and on the real sample."""

from __future__ import annotations

import numpy as np
import pytest

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Vocabulary


@pytest.fixture
def coco(load_recipe):
    return load_recipe("coco_stuff")


@pytest.fixture
def miniature(tmp_path, picture_files):
    """`miniature(values, suffix)`: per split, images whose maps hold the values and 255."""
    write_image, write_map, _ = picture_files

    def write(values: dict[str, list[int]], suffix: str = ""):
        root = tmp_path / "coco"
        for split, numbers in values.items():
            for number, value in enumerate(numbers):
                name = f"{number:012d}"
                write_image(root / "images" / f"{split}2017" / f"{name}.jpg", number)
                pixels = np.full((12, 16), 255)
                pixels[2:5] = value
                write_map(root / "annotations" / f"{split}2017" / f"{name}{suffix}.png", pixels)
        return root

    return write


def test_train_ids(coco, miniature, options, read_back):
    root = miniature({"train": [0, 170, 5], "val": [84]}, "_labelTrainIds")
    reports = coco.build(coco.CocoStuff(root, options(verify=True)))
    assert [report.num_samples for report in reports] == [3, 1]
    train = read_back(options().out / "train")
    labels = [train[f"{number:012d}"][1] for number in range(3)]
    assert labels == [[0], [170], [5]]
    mask = train["000000000001"][2]
    assert mask.dtype == np.uint16 and mask[3, 3] == 170 and mask[0, 0] == 65535
    vocabulary = Vocabulary.load(options().out / "val" / "vocabulary.json")
    assert len(vocabulary) == 171 and vocabulary.names[84] == "building-other"


def test_official_ids_are_mapped(coco, miniature, options, read_back):
    """Value 12 is id 13, stop sign = class 11; 91 is banner = 80; 181 is wood = 170."""
    root = miniature({"train": [0, 12, 91, 181]})
    coco.build(coco.CocoStuff(root, options(), splits=("train",)))
    train = read_back(options().out / "train")
    assert [train[f"{number:012d}"][1][0] for number in range(4)] == [0, 11, 80, 170]


def test_the_tables_cover_all_classes(coco):
    for table in coco.TABLES.values():
        assert sorted(set(table.values())) == list(range(-1, 171))


def test_encoding_is_detected_or_asked_for(coco, miniature, options):
    root = miniature({"train": [3, 11]})  # 11 is no id, so these are train ids
    assert coco.detect_encoding([p.mask for p in coco.list_split(root, "train")]) == "train_ids"
    root = miniature({"train": [3, 4]})
    with pytest.raises(ValueError, match="give --encoding"):
        coco.build(coco.CocoStuff(root, options(), splits=("train",)))
    report = coco.build(coco.CocoStuff(root, options(), splits=("train",), encoding="ids"))
    assert report[0].num_samples == 2


def test_wrong_encoding_is_refused(coco, miniature, options):
    root = miniature({"train": [175]})
    recipe = coco.CocoStuff(root, options(), splits=("train",), encoding="train_ids")
    with pytest.raises(ValueError, match=r"000000000000.png: value\(s\) \[175\]"):
        coco.build(recipe)


def test_labels_only(coco, miniature, options, read_back):
    root = miniature({"train": [170]}, "_labelTrainIds")
    coco.build(coco.CocoStuff(root, options(), splits=("train",), labels_only=True))
    assert [item[1:] for item in read_back(options().out / "train").values()] == [([170], None)]


def test_missing_parts_are_named(coco, miniature, options):
    with pytest.raises(ValueError, match=r"no folder .*train2017"):
        coco.build(coco.CocoStuff(options().out, options()))
    root = miniature({"train": [0, 1]}, "_labelTrainIds")
    (root / "annotations/train2017/000000000001_labelTrainIds.png").unlink()
    with pytest.raises(ValueError, match=r"000000000001.jpg has no label map"):
        coco.build(coco.CocoStuff(root, options(), splits=("train",)))


def test_real_sample(coco, options, real_data):
    recipe = coco.CocoStuff(real_data / "cocostuff171_sample", options(verify=True))
    reports = coco.build(recipe)
    assert [report.num_samples for report in reports] == [13, 8]
    index = Index.open(options().out / "val")
    names = Vocabulary.load(options().out / "val" / "vocabulary.json").names
    row = next(index.row(i) for i in range(len(index)) if index.row(i).key == "000000000139")
    found = {names[label] for label in row.labels}
    assert {"person", "chair", "tv", "floor-wood", "window-other"} <= found  # a living room
