"""ADE20K on miniatures of the challenge's and of the full release's folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WALL, PERSON, WINDOWPANE = 2978, 1831, 3055  # object numbers of the full release
OUTSIDE = 1  # an object that is not among the 847


@pytest.fixture
def ade(load_recipe):
    return load_recipe("ade20k")


@pytest.fixture
def challenge(tmp_path, picture_files):
    write_image, write_map, _ = picture_files
    root = tmp_path / "ADEChallengeData2016"
    for split, short in (("training", "train"), ("validation", "val")):
        for number in range(3):
            name = f"ADE_{short}_{number:08d}"
            write_image(root / "images" / split / f"{name}.jpg", number)
            pixels = np.zeros((12, 16))
            pixels[4:] = 150
            pixels[8:] = number + 1
            write_map(root / "annotations" / split / f"{name}.png", pixels)
    return root


@pytest.fixture
def full(tmp_path, picture_files):
    """`full(objects)`: one training image; object number -> name, in rows from the top."""
    write_image = picture_files[0]

    def write(objects: dict[int, str]):
        root = tmp_path / "ADE20K_2021_17_01"
        stem = root / "images/ADE/training/home_or_hotel/bedroom/ADE_train_00000001"
        write_image(stem.with_suffix(".jpg"))
        pixels = np.zeros((12, 16, 3), np.uint8)
        for row, number in enumerate(objects):
            pixels[row, :, 0] = number // 256 * 10
            pixels[row, :, 1] = number % 256
        Image.fromarray(pixels).save(f"{stem}_seg.png")
        items = [
            {"id": index, "name": name, "name_ndx": number, "raw_name": name}
            for index, (number, name) in enumerate(objects.items())
        ]
        annotation = {"annotation": {"filename": f"{stem.name}.jpg", "object": items}}
        stem.with_suffix(".json").write_text(json.dumps(annotation), encoding="latin-1")
        return root

    return write


def test_150_classes(ade, challenge, options, read_back):
    reports = ade.build(ade.Ade20k(challenge, options(verify=True)))
    assert [report.num_samples for report in reports] == [3, 3]
    _, labels, mask = read_back(options().out / "train")["ADE_train_00000001"]
    assert labels == [1, 149]
    assert (mask[0, 0], mask[5, 0], mask[9, 0]) == (65535, 149, 1)


def test_what_is_left_out_is_named(ade, challenge, full, options):
    images, masks = challenge / "images/training", challenge / "annotations/training"
    for name in ("x.bmp", "y.png", "z.jpeg"):
        (images / name).touch()
    (masks / "z.png").touch()
    (report,) = ade.build(ade.Ade20k(challenge, options(), splits=("train",)))
    assert dict(report.skipped) == {
        "x.bmp": ".bmp: none of .jpg",
        "y.png": ".png: none of .jpg",
        "z.jpeg": ".jpeg: none of .jpg",
        str(masks / "z.png"): "a mask without an image",
    }
    root = full({WALL: "wall"})
    other = root / "images/ADE/training/z"
    for end in (".jpeg", "_seg.png"):
        other.with_name(f"z{end}").touch()
    assert [Path(item.key).name for item in ade.list_full(root, "train")[1]] == [
        "z.jpeg",
        "z_seg.png",
    ]


def test_150_classes_as_image_labels(ade, challenge, options, read_back):
    ade.build(ade.Ade20k(challenge, options(), splits=("val",), labels_only=True))
    content = read_back(options().out / "val")
    assert content["ADE_val_00000002"][1:] == ([2, 149], None)


def test_847_classes(ade, full, options, read_back):
    objects = {WALL: "wall", PERSON: "person, individual, someone, somebody, mortal, soul"}
    root = full({**objects, WINDOWPANE: "windowpane, window", OUTSIDE: "caf\xe9"})
    ade.build(ade.Ade20k(root, options(), classes=847, splits=("train",)))
    _, labels, mask = read_back(options().out / "train")["ADE_train_00000001"]
    assert labels == [0, 11, 13]
    assert mask[:5, 0].tolist() == [0, 11, 13, 65535, 65535]


def test_847_class_numbers_are_checked_by_name(ade, full, options):
    root = full({WALL: "teapot"})
    with pytest.raises(ValueError, match="object number 2978 is 'teapot', expected 'wall'"):
        ade.build(ade.Ade20k(root, options(), classes=847, splits=("train",)))


def test_847_object_numbers(ade):
    numbers = ade.object_ids()
    assert len(numbers) == len(set(numbers)) == 847
    assert all(0 < number < 25 * 256 + 256 for number in numbers)


def test_missing_annotation_is_named(ade, challenge, options):
    (challenge / "annotations/training/ADE_train_00000002.png").unlink()
    with pytest.raises(ValueError, match=r"ADE_train_00000002.jpg has no annotation"):
        ade.build(ade.Ade20k(challenge, options()))
    with pytest.raises(ValueError, match=r"no folder .*images/ADE/training"):
        ade.build(ade.Ade20k(challenge, options(), classes=847))
