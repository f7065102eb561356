"""COCO-Stuff, 164k and 10k, on miniatures of the official folders, and on the real sample."""

from __future__ import annotations

import functools
import sys

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


def test_train_ids(coco, miniature, options, read_back, capsys):
    root = miniature({"train": [0, 170, 5], "val": [84]}, "_labelTrainIds")
    reports = coco.build(coco.CocoStuff(root, options(verify=True)))
    assert [report.num_samples for report in reports] == [3, 1]
    printed = capsys.readouterr().out
    assert (
        "train: 3 images, NOT the 118,287 of the full data set, label maps hold train_ids"
        in printed
    )
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
    from_0, from_1 = coco.TABLES["ids"], coco.TABLES["ids_from_1"]
    assert all(from_1[value + 1] == local for value, local in from_0.items() if local >= 0)


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


@pytest.fixture
def miniature_10k(tmp_path, picture_files):
    """`miniature_10k(train, test, ends_with)`: images whose maps hold such values."""

    def write(train, test=(), ends_with=".mat", folder="", unlabelled=0):
        root = tmp_path / "cocostuff-10k"
        (root / "imageLists").mkdir(parents=True, exist_ok=True)
        for split, values in (("train", train), ("test", test)):
            names = [f"COCO_train2014_{split}{number}" for number in range(len(values))]
            (root / "imageLists" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
            sub = folder.format(split)
            for number, (name, value) in enumerate(zip(names, values, strict=True)):
                picture_files[0](root / "images" / sub / f"{name}.jpg", number)
                pixels = np.full((12, 16), unlabelled, np.uint16)
                pixels[2:5] = value
                path = root / "annotations" / sub / f"{name}{ends_with}"
                path.parent.mkdir(parents=True, exist_ok=True)
                if ends_with == ".mat":
                    savemat = pytest.importorskip("scipy.io").savemat
                    savemat(path, {"S": pixels, "names": ["person"]}, do_compression=True)
                else:
                    picture_files[1](path, pixels)
        return root

    return write


def build_10k(coco, root, options, read_back, **changes):
    """Classes of the train split's images, in order."""
    recipe = coco.CocoStuff(root, options(), "10k", ("train",), **changes)
    coco.build(recipe)
    found = read_back(options().out / "train")
    assert all(int(mask[0, 0]) == 65535 for _, _, mask in found.values())
    return [found[key][1] for key in sorted(found)]


def test_10k_as_it_is_released(coco, miniature_10k, options, read_back, capsys):
    """Id 1 is person = class 0; 13 stop sign = 11; 92 banner = 80; 182 wood = 170."""
    root = miniature_10k([1, 13, 92, 182], [2])
    reports = coco.build(coco.CocoStuff(root, options(verify=True), "10k"))
    assert [report.num_samples for report in reports] == [4, 1]
    printed = capsys.readouterr().out
    assert (
        "train: 4 images, NOT the 9,000 of the full data set, label maps hold ids_from" in printed
    )
    assert "val: 1 images, NOT the 1,000 of the full data set" in printed
    train = read_back(options().out / "train")
    assert [train[f"COCO_train2014_train{n}"][1] for n in range(4)] == [[0], [11], [80], [170]]
    mask = train["COCO_train2014_train3"][2]
    assert (mask[0, 0], mask[3, 3]) == (65535, 170)
    assert [item[1] for item in read_back(options().out / "val").values()] == [[1]]


@pytest.mark.parametrize("folder", ["", "{}2014"])
def test_10k_train_ids_of_the_toolboxes(coco, miniature_10k, options, read_back, folder):
    """There 0 is unlabelled, not person as in the 164k's files of the same name."""
    root = miniature_10k([1, 12, 81, 171], (), "_labelTrainIds.png", folder)
    assert build_10k(coco, root, options, read_back) == [[0], [11], [80], [170]]


def test_10k_train_ids_as_in_the_164k(coco, miniature_10k, options, read_back):
    root = miniature_10k([0, 11, 170], (), "_labelTrainIds.png", unlabelled=255)
    assert build_10k(coco, root, options, read_back) == [[0], [11], [170]]


def test_10k_a_file_name_that_says_train_ids_decides(coco, miniature_10k, options, read_back):
    root = miniature_10k([2, 13], (), "_labelTrainIds.png")  # values that fit ids too
    assert build_10k(coco, root, options, read_back) == [[1], [12]]
    root = miniature_10k([2, 172], (), "_labelTrainIds.png")
    with pytest.raises(ValueError, match=r"train1_labelTrainIds.png: value\(s\) \[172\]"):
        build_10k(coco, root, functools.partial(options, out=options().out / "b"), read_back)


def test_10k_plain_pngs_are_told_by_their_values(coco, miniature_10k, options, read_back):
    def build(values, unlabelled, **changes):
        root = miniature_10k(values, (), ".png", unlabelled=unlabelled)
        out = options().out / str(values)  # the paths and the encoding may be those of another case
        return build_10k(coco, root, functools.partial(options, out=out), read_back, **changes)

    assert build([1, 13, 182], 0) == [[0], [11], [170]]  # S itself
    assert build([1, 12, 171], 0) == [[0], [11], [170]]  # 12 is no id
    assert build([0, 12, 181], 255) == [[0], [11], [170]]  # S - 1
    assert build([0, 11, 170], 255) == [[0], [11], [170]]  # 11 is no id - 1
    assert build([1, 172], 0) == [[0], [160]]
    assert build([1, 13, 171], 0, encoding="train_ids_from_1") == [[0], [12], [170]]
    with pytest.raises(ValueError, match=r"fit several forms; give --encoding .*ids_from_1"):
        build([13, 14], 0)
    assert build([13, 15], 0, encoding="ids_from_1") == [[11], [13]]
    with pytest.raises(ValueError, match=r"cannot tell .*values \[12, 182\]"):
        build([12, 182], 12)  # neither 0 nor 255


def test_10k_a_matlab_file_is_preferred_and_needs_no_guess(coco, miniature_10k, options, read_back):
    miniature_10k([5, 1], (), ".mat")
    root = miniature_10k([1, 171], (), ".png", unlabelled=255)
    (root / "annotations/COCO_train2014_train1.mat").unlink()
    assert build_10k(coco, root, options, read_back) == [[4], [160]]  # of 0..181


def test_10k_what_is_missing_or_wrong_is_named(coco, miniature_10k, options, monkeypatch):
    def build(root):
        coco.build(coco.CocoStuff(root, options(), "10k", ("val",)))

    with pytest.raises(ValueError, match=r"no list of images .*imageLists/test.txt; give the"):
        build(options().out)
    root = miniature_10k([1], [12])
    path = root / "annotations" / "COCO_train2014_test0.mat"
    with pytest.raises(ValueError, match=r"test0.mat: value\(s\) \[12\] are no class"):
        build(root)
    content = path.read_bytes()
    for broken in (b"", content[:60], content[:-20], content[:150] + b"?" * 8 + content[158:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"test0.mat has no label map S \("):
            build(root)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy.io.matlab", None)
        with pytest.raises(ValueError, match=r"pip install scipy, or put PNG conversions"):
            build(root)
    path.unlink()
    with pytest.raises(ValueError, match=r"no .*annotations/COCO_train2014_test0.mat, which is in"):
        build(root)
    (root / "images" / "COCO_train2014_test0.jpg").unlink()
    with pytest.raises(ValueError, match=r"no .*images/COCO_train2014_test0.jpg, which is in"):
        build(root)


def test_real_sample(coco, options, real_data):
    recipe = coco.CocoStuff(real_data / "cocostuff171_sample", options(verify=True))
    reports = coco.build(recipe)
    assert [report.num_samples for report in reports] == [13, 8]
    index = Index.open(options().out / "val")
    names = Vocabulary.load(options().out / "val" / "vocabulary.json").names
    row = next(index.row(i) for i in range(len(index)) if index.row(i).key == "000000000139")
    found = {names[label] for label in row.labels}
    assert {"person", "chair", "tv", "floor-wood", "window-other"} <= found  # a living room
