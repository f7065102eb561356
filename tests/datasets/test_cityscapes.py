"""Cityscapes on a miniature of its official folders, with both kinds of label maps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from memseg_dist.batch import IGNORE
from memseg_dist.data.evalset import EvalDataset
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import LabelSpace, Vocabulary

AACHEN, BOCHUM = "aachen_000000_000019", "bochum_000000_000313"
FRANKFURT, BERLIN = "frankfurt_000000_000294", "berlin_000000_000019"
OFFICIAL = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""Label ids of the classes that are scored."""


@pytest.fixture
def cityscapes(load_recipe):
    return load_recipe("cityscapes")


def write_image(root, split, key):
    path = root / "leftImg8bit" / split / key.partition("_")[0] / f"{key}_leftImg8bit.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12)).save(path)
    return path


@pytest.fixture
def root(tmp_path, picture_files):
    """Train: labelTrainIds and labelIds; val: labelIds alone; test: labelIds that say nothing."""
    root = tmp_path / "cityscapes"

    def write(split, key, kind, values):
        path = root / "gtFine" / split / key.partition("_")[0] / f"{key}_gtFine_{kind}.png"
        picture_files[1](path, np.repeat(values, 16).reshape(-1, 16))

    for split, key in (("train", AACHEN), ("train", BOCHUM), ("val", FRANKFURT), ("test", BERLIN)):
        write_image(root, split, key)
        write(split, key, "labelIds", [26] * 6 + [3] * 6)
    write("train", AACHEN, "labelTrainIds", [0] * 5 + [255] + [18] * 6)
    return root


def test_images_of_other_kinds_are_named(cityscapes, root, options):
    other = root / "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.jpg"
    other.touch()
    (report,) = cityscapes.build(cityscapes.Cityscapes(root, options(), splits=("train",)))
    assert dict(report.skipped) == {f"aachen/{other.name}": ".jpg: none of _leftimg8bit.png"}


def test_the_splits(cityscapes, root, options, read_back, capsys):
    splits = ("train", "val", "trainval", "test")
    reports = cityscapes.build(cityscapes.Cityscapes(root, options(verify=True), splits))
    assert [report.num_samples for report in reports] == [2, 1, 3, 1]
    printed = capsys.readouterr().out
    assert "train: 2 images, NOT the 2,975 of the full data set" in printed
    assert "trainval: 3 images, NOT the 3,475 of the full data set" in printed
    out = options().out
    assert Vocabulary.load(out / "val" / "vocabulary.json").names == tuple(OFFICIAL)
    index = Index.open(out / "trainval")
    assert {index.row(i).key for i in range(3)} == {AACHEN, BOCHUM, FRANKFURT}
    test = Index.open(out / "test")
    assert (test.row(0).key, test.num_masks, list(test.row(0).labels)) == (BERLIN, 0, [])


def masks(cityscapes, root):
    return {
        picture.key: cityscapes.read_mask(picture.mask)
        for name in ("train", "val")
        for picture in cityscapes.list_folder(root, name)
    }


def test_train_ids_are_preferred_to_label_ids(cityscapes, root):
    found = masks(cityscapes, root)
    assert [int(value) for value in found[AACHEN][(0, 5, 9), 3]] == [0, 65535, 18]
    for key in (BOCHUM, FRANKFURT):
        assert [int(value) for value in found[key][(0, 9), 3]] == [13, 65535]


def test_every_label_id(cityscapes, tmp_path, picture_files):
    """0..33: the 19 scored ones in order, all else unknown; 255 is the license plate's -1."""
    path = tmp_path / "x_gtFine_labelIds.png"
    picture_files[1](path, np.array([[*range(34), 255]]))
    classes = {value: local for local, value in enumerate(OFFICIAL.values())}
    expected = [classes.get(value, 65535) for value in [*range(34), 255]]
    assert cityscapes.read_mask(str(path)).tolist() == [expected]
    path = tmp_path / "x_gtFine_labelTrainIds.png"
    picture_files[1](path, np.array([[*range(19), 255]]))
    assert cityscapes.read_mask(str(path)).tolist() == [[*range(19), 65535]]


def test_halved_images_are_means_and_labels_majorities(cityscapes, root, options, picture_files):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    labels = rng.integers(0, 3, (12, 16))
    labels[:2, :2], labels[:2, 2:4] = [[1, 255], [255, 0]], [[2, 1], [0, 1]]
    name = "leftImg8bit/val/frankfurt/" + FRANKFURT + "_leftImg8bit.png"
    Image.fromarray(pixels).save(root / name)
    path = root / "gtFine/val/frankfurt" / f"{FRANKFURT}_gtFine_labelTrainIds.png"
    picture_files[1](path, labels)
    recipe = cityscapes.Cityscapes(root, options(verify=True), ("val",), half=True)
    cityscapes.build(recipe)
    space = LabelSpace.union({"val": Vocabulary.load(cityscapes.VOCABULARY)})
    (item,) = EvalDataset(options().out / "val", space, "val", resize=None)
    for row, column in np.ndindex(6, 8):
        block = np.s_[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        mean = pixels[block].reshape(4, 3).astype(int).sum(0) / 4
        assert (np.floor(mean + 0.5) == item.image[:, row, column].numpy()).all()
        values, counts = np.unique(labels[block], return_counts=True)
        found = int(item.truth[row, column])
        assert counts[values == (255 if found == IGNORE else found)] == counts.max()
    assert item.truth[0, :2].tolist() == [IGNORE, 1]
    Image.new("RGB", (15, 12)).save(root / name)
    with pytest.raises(ValueError, match=r"_leftImg8bit\.png is 15 x 12 pixels; --half needs even"):
        cityscapes.build(dataclasses.replace(recipe, options=options(out=root / "odd")))


def test_the_full_count_is_not_complained_about(cityscapes, root, options, monkeypatch, capsys):
    monkeypatch.setattr(cityscapes, "COUNTS", {"val": 1})
    cityscapes.build(cityscapes.Cityscapes(root, options(), ("val",)))
    assert "val: 1 images\n" in capsys.readouterr().out


def test_what_is_missing_or_wrong_is_named(cityscapes, root, options, tmp_path, picture_files):
    recipe = cityscapes.Cityscapes(root, options(), ("val",))
    with pytest.raises(ValueError, match=r"no folder .*leftImg8bit/val"):
        cityscapes.build(dataclasses.replace(recipe, root=tmp_path))
    path = root / "gtFine/val/frankfurt" / f"{FRANKFURT}_gtFine_labelIds.png"
    picture_files[1](path, np.full((12, 16), 34))
    with pytest.raises(ValueError, match=r"000294_gtFine_labelIds.png: value\(s\) \[34\] are no"):
        cityscapes.build(recipe)
    train_ids = path.with_name(f"{FRANKFURT}_gtFine_labelTrainIds.png")
    picture_files[1](train_ids, np.full((12, 16), 19))
    with pytest.raises(ValueError, match=r"labelTrainIds.png: value\(s\) \[19\] are no class"):
        cityscapes.build(dataclasses.replace(recipe, options=options(overwrite=True)))
    train_ids.unlink()
    path.unlink()
    with pytest.raises(ValueError, match=r"000294_leftImg8bit.png has no label map .*labelIds"):
        cityscapes.build(recipe)


def test_classes_are_shared_with_the_other_data_sets(cityscapes, load_recipe):
    ours = Vocabulary.load(cityscapes.VOCABULARY)
    stuff = Vocabulary.load(load_recipe("coco_stuff").VOCABULARY)
    ade = Vocabulary.load(load_recipe("ade20k").VOCABULARIES / "ade20k_847.json")
    for name in ("person", "car", "bicycle", "bus", "train", "truck", "motorcycle", "road"):
        assert ours.uids[ours.names.index(name)] == stuff.uids[stuff.names.index(name)]
    for name in ("sidewalk", "building", "wall", "fence", "pole", "sky", "person", "car"):
        assert ours.uids[ours.names.index(name)] == ade.uids[ade.names.index(name)]
    union = LabelSpace.union({"cityscapes": ours, "stuff": stuff, "ade": ade})
    new = [
        category.name
        for category in ours.categories
        if category.uid not in {*stuff.uids, *ade.uids}
    ]
    assert new == ["traffic sign", "vegetation", "terrain", "rider"]
    assert union.vocabulary.names[:19] == ours.names
