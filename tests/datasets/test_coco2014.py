"""COCO 2014 on a miniature of the official files, the painting of instances, and real pictures."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Vocabulary

PERSON, CAR, TOOTHBRUSH = 1, 3, 80
HEIGHT, WIDTH = 12, 16


@pytest.fixture
def coco(load_recipe):
    return load_recipe("coco2014")


def box(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def runs(inside):
    """COCO's uncompressed run lengths of a bool [H, W], by the slow definition."""
    counts, current = [0], False
    for pixel in inside.T.reshape(-1).tolist():
        if pixel != current:
            counts.append(0)
            current = pixel
        counts[-1] += 1
    return {"counts": counts, "size": list(inside.shape)}


CROWD = np.zeros((HEIGHT, WIDTH), bool)
CROWD[1:11, 2:7] = True
INSTANCES = {  # image id -> (category id, area, is crowd, segmentation)
    7: [
        (90, 4.0, 0, [box(3, 3, 5, 5)]),
        (1, 50.0, 1, runs(CROWD)),
        (3, 30.0, 0, [box(5, 2, 8, 7), box(9, 2, 12, 7)]),
    ],
    5: [(3, 16.0, 0, [box(1, 1, 5, 5)])],
    9: [],
}


@pytest.fixture
def root(coco, tmp_path, picture_files):
    names = Vocabulary.load(coco.VOCABULARY).names[1:]
    ids = [value for value in range(1, 91) if value not in
           (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # fmt: skip
    categories = [{"id": value, "name": name} for value, name in zip(ids, names, strict=True)]
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        images, annotations = [], []
        for image, instances in INSTANCES.items():
            file = f"COCO_{split}2014_{image:012d}.jpg"
            picture_files[0](root / f"{split}2014" / file, image, (WIDTH, HEIGHT))
            images.append({"id": image, "file_name": file, "height": HEIGHT, "width": WIDTH})
            for category, area, crowd, segmentation in instances:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": category,
                        "area": area,
                        "iscrowd": crowd,
                        "segmentation": segmentation,
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": categories[::-1]}
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))
    return root


def test_official_files(coco, root, options, read_back, capsys):
    reports = coco.build(coco.Coco2014(root, options(verify=True)))
    assert [report.num_samples for report in reports] == [3, 3]
    assert "train: 3 images, 1 of them without an instance" in capsys.readouterr().out
    train = read_back(options().out / "train")
    assert {key[-2:]: item[1:] for key, item in train.items()} == {
        "07": ([PERSON, CAR, TOOTHBRUSH], None),
        "05": ([CAR], None),
        "09": ([], None),
    }
    val = read_back(options().out / "val")
    expected = np.zeros((HEIGHT, WIDTH), np.uint16)
    expected[CROWD] = PERSON
    expected[2:7, 5:8] = expected[2:7, 9:12] = CAR  # smaller than the crowd
    expected[3:5, 3:5] = TOOTHBRUSH  # the smallest
    assert np.array_equal(val["COCO_val2014_000000000007"][2], expected)
    assert val["COCO_val2014_000000000007"][1] == [0, PERSON, CAR, TOOTHBRUSH]
    assert not val["COCO_val2014_000000000009"][2].any()
    assert val["COCO_val2014_000000000009"][1] == [0]


def test_ray_writes_the_same_bytes(coco, root, options, tmp_path):
    for out, workers in (("here", 0), ("parallel", 2)):
        choice = options(out=tmp_path / out, workers=workers, samples_per_shard=1)
        coco.build(coco.Coco2014(root, choice, splits=("val",)))
    for path in sorted((tmp_path / "here" / "val").glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "parallel" / "val" / path.name).read_bytes()


def test_masks_of_train(coco, root, options, read_back):
    coco.build(coco.Coco2014(root, options(), splits=("train",), with_masks=True))
    train = read_back(options().out / "train")
    assert train["COCO_train2014_000000000005"][1] == [0, CAR]
    assert (train["COCO_train2014_000000000005"][2] == CAR).sum() == 16


def test_the_division_of_2017(coco, root, options, read_back):
    """The same kind of files under other names; the keys are the files' names."""
    for split in ("train", "val"):
        old = root / "annotations" / f"instances_{split}2014.json"
        content = old.read_text().replace(f"COCO_{split}2014_", "")
        (root / "annotations" / f"instances_{split}2017.json").write_text(content)
        old.unlink()
        for path in [*(root / f"{split}2014").iterdir()]:
            new = root / f"{split}2017" / path.name.removeprefix(f"COCO_{split}2014_")
            new.parent.mkdir(exist_ok=True)
            path.rename(new)
    coco.build(coco.Coco2014(root, options(), with_masks=True, year=2017))
    train = read_back(options().out / "train")
    assert sorted(train) == ["000000000005", "000000000007", "000000000009"]
    assert (train["000000000005"][2] == CAR).sum() == 16
    assert len(read_back(options().out / "val")) == 3
    with pytest.raises(ValueError, match=r"instances_train2014\.json"):
        coco.build(coco.Coco2014(root, options(overwrite=True)))


def by_ray_casting(corners, height, width):
    """The slow definition: cross the outline an odd number of times on the way from the left."""
    inside = np.zeros((height, width), bool)
    edges = list(zip(corners, np.roll(corners, -1, axis=0), strict=True))
    for row, column in np.ndindex(height, width):
        x, y = column + 0.5, row + 0.5
        for (x1, y1), (x2, y2) in edges:
            if (y1 <= y) != (y2 <= y) and x >= x1 + (y - y1) * (x2 - x1) / (y2 - y1):
                inside[row, column] ^= True
    return inside


def test_polygons_hold_the_pixels_whose_centres_are_inside(coco):
    rng = np.random.default_rng(0)
    areas = []
    for corners in (3, 4, 9, 30):
        for _ in range(8):
            polygon = rng.uniform(-4, 22, (corners, 2))  # over the borders, crossing itself
            found = coco.fill_polygon(polygon, HEIGHT, WIDTH)
            assert np.array_equal(found, by_ray_casting(polygon, HEIGHT, WIDTH))
            angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
            radius = rng.uniform(5, 40, corners)
            star = np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None] + 50
            x, y = star.T
            true = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
            areas.append(coco.fill_polygon(star, 100, 100).sum() - true)
    assert abs(np.mean(areas)) < 5  # no shrinking, no growing
    assert not coco.fill_polygon(np.array([[2.0, 2.0], [9.0, 9.0]]), HEIGHT, WIDTH).any()
    outside = np.array(box(-9, -9, -2, -3), float).reshape(-1, 2)
    assert not coco.fill_polygon(outside, HEIGHT, WIDTH).any()


def test_runs_are_decoded_and_checked(coco):
    for seed in range(5):
        inside = np.random.default_rng(seed).random((5, 7)) < 0.4
        assert np.array_equal(coco.decode_runs(runs(inside)["counts"], 5, 7), inside)
    for counts in ([3, 4], "abc0"):
        with pytest.raises(ValueError, match="do not add up to 5 x 7 pixels"):
            coco.decode_runs(counts, 5, 7)


def test_what_is_missing_or_wrong_is_named(coco, root, options):
    def change(function):
        path = root / "annotations" / "instances_val2014.json"
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))
        coco.build(coco.Coco2014(root, options(), splits=("val",)))

    with pytest.raises(ValueError, match=r"nowhere.annotations.instances_train2014.json"):
        coco.build(dataclasses.replace(coco.Coco2014(root, options()), root=root / "nowhere"))
    with pytest.raises(ValueError, match=r"000000000005.jpg: an instance of class 3 cannot be"):
        change(lambda content: content["annotations"][3].update(segmentation=[[1, 2, 3]]))
    with pytest.raises(ValueError, match="annotation 4 is of no listed image"):
        change(lambda content: content["annotations"][3].update(image_id=1))
    with pytest.raises(ValueError, match=r"not COCO's 80 .*\('cat', 'dog'\)"):
        change(lambda content: content["categories"][-17].update(name="cat"))
    (root / "train2014" / "COCO_train2014_000000000005.jpg").unlink()
    with pytest.raises(ValueError, match=r"000000000005.jpg is missing; unpack train2014.zip"):
        coco.build(coco.Coco2014(root, options()))


@pytest.fixture
def sample(coco, tmp_path, picture_files):
    root = tmp_path / "sample"
    images = []
    for number, split in enumerate(("train", "train", "val")):
        file = f"{number}.jpg"
        picture_files[0](root / "images" / file, number)
        pixels = np.full((12, 16), 255)
        pixels[4:8] = 79 - number
        picture_files[1](root / "masks" / f"{number}.png", pixels)
        images.append({"file": file, "split": split, "labels": [79 - number]})
    names = list(Vocabulary.load(coco.VOCABULARY).names[1:])
    (root / "index.json").write_text(json.dumps({"classes": names, "images": images}))
    return root


def test_a_small_sample(coco, sample, options, read_back):
    reports = coco.build(coco.Coco2014(sample, options(verify=True)))
    assert [report.num_samples for report in reports] == [2, 1]
    train = read_back(options().out / "train")
    assert [labels for _, labels, _ in (train["0"], train["1"])] == [[0, 80], [0, 79]]
    mask = train["0"][2]
    assert (mask[0, 0], mask[5, 5]) == (0, 80)
    content = json.loads((sample / "index.json").read_text())
    (sample / "index.json").write_text(json.dumps(content | {"classes": ["dog"]}))
    with pytest.raises(ValueError, match="its classes are not COCO's 80"):
        coco.build(coco.Coco2014(sample, options()))


def test_real_pictures(coco, options, real_data):
    reports = coco.build(coco.Coco2014(real_data / "coco80", options(verify=True)))
    assert [report.num_samples for report in reports] == [470, 302]
    vocabulary = Vocabulary.load(options().out / "train" / "vocabulary.json")
    listed = json.loads((real_data / "coco80" / "index.json").read_text())
    labels = {item["file"].removesuffix(".jpg"): item["labels"] for item in listed["images"]}
    index = Index.open(options().out / "train")
    assert index.num_masks == 470
    for number in range(len(index)):
        row = index.row(number)
        assert {*row.labels} - {0} == {label + 1 for label in labels[row.key]}
    assert vocabulary.names[labels["000000000009"][0] + 1] == "bowl"
    row = next(index.row(i) for i in range(len(index)) if index.key(i) == "000000000009")
    with open(options().out / "train" / row.shard, "rb") as stream:
        stream.seek(row.mask_offset)
        mask = np.array(Image.open(io.BytesIO(stream.read(row.mask_size))))
    truth = np.array(Image.open(real_data / "coco80" / "masks" / "000000000009.png"))
    assert np.array_equal(mask, np.where(truth == 255, 0, truth.astype(int) + 1))
