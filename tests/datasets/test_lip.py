"""LIP and CIHP on miniatures of their official folders, in all the ways they are unpacked."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from memseg_dist.data.vocabulary import LabelSpace, Vocabulary
from memseg_dist.tools import shipped

IMAGES, MASKS = "TrainVal_images", "TrainVal_parsing_annotations"
LAYOUTS = {
    "doubled": (f"{IMAGES}/{IMAGES}", f"{MASKS}/{MASKS}"),
    "archive": (IMAGES, MASKS),
    "flat": (".", "."),
}
NAMES = {"train": ["100034_483681", "77_471474"], "val": ["10005_205677"]}
TORSO = 10


@pytest.fixture
def lip(load_recipe):
    return load_recipe("lip")


@pytest.fixture
def draw(picture_files):
    """`draw(image, mask, value)`: a person of `value` below background, unknown between."""

    def write(image, mask, value):
        pixels = np.zeros((12, 16), np.uint8)
        pixels[5], pixels[6:] = 255, value
        picture_files[0](image)
        picture_files[1](mask, pixels)

    return write


@pytest.fixture
def lip_root(tmp_path, draw):
    """`lip_root(layout, lists)`: one of LAYOUTS, the lists in that folder below ROOT."""

    def write(layout="doubled", lists="."):
        images, masks = (tmp_path / "LIP" / folder for folder in LAYOUTS[layout])
        for split, names in NAMES.items():
            for number, name in enumerate(names):
                image = images / f"{split}_images" / f"{name}.jpg"
                draw(image, masks / f"{split}_segmentations" / f"{name}.png", TORSO + number)
            (tmp_path / "LIP" / lists / f"{split}_id.txt").write_text("\n".join(names) + "\n")
        return tmp_path / "LIP"

    return write


@pytest.fixture
def cihp_root(tmp_path, draw):
    """instance-level_human_parsing: one image of a torso per split."""
    root = tmp_path / "instance-level_human_parsing"
    for split in ("Training", "Validation"):
        folder = root / split
        draw(folder / "Images" / "0000006.jpg", folder / "Category_ids" / "0000006.png", TORSO)
    return root


@pytest.mark.parametrize(
    ("layout", "lists"), [("doubled", "."), ("doubled", IMAGES), ("archive", "."), ("flat", ".")]
)
def test_lip_in_every_layout(lip, lip_root, options, read_back, layout, lists, capsys):
    reports = lip.build(lip.Lip(lip_root(layout, lists), options(verify=True)))
    assert [report.num_samples for report in reports] == [2, 1]
    printed = capsys.readouterr().out
    assert "train: 2 images, NOT the 30,462 of the full data set" in printed
    assert "val: 1 images, NOT the 10,000 of the full data set" in printed
    train = read_back(options().out / "train")
    assert sorted(train) == NAMES["train"]
    assert [train[name][1] for name in NAMES["train"]] == [[0, 10], [0, 11]]
    mask = train["77_471474"][2]
    assert (mask[0, 0], mask[5, 3], mask[9, 3]) == (0, 65535, 11)
    assert Vocabulary.load(options().out / "val/vocabulary.json").names[TORSO] == "jumpsuits"


@pytest.mark.parametrize("parent", [False, True])
def test_cihp_is_read_by_position(lip, cihp_root, options, read_back, parent, capsys):
    """As MCIBI must have: its torso skin is LIP's jumpsuits."""
    root = cihp_root.parent if parent else cihp_root
    reports = lip.build(lip.Lip(root, options(verify=True), "cihp"))
    assert [report.num_samples for report in reports] == [1, 1]
    assert "NOT the 28,280 of" in capsys.readouterr().out
    val = read_back(options().out / "val")
    assert [(key, item[1]) for key, item in val.items()] == [("0000006", [0, TORSO])]
    found = Vocabulary.load(options().out / "val" / "vocabulary.json")
    assert found == Vocabulary.load(lip.VOCABULARY)


def test_torso_skin_unknown_or_a_class(lip, cihp_root, options, read_back):
    def build(torso_skin):
        changed = options(out=options().out / torso_skin)
        lip.build(lip.Lip(cihp_root, changed, "cihp", ("val",), torso_skin))
        split = changed.out / "val"
        labels, mask = read_back(split)["0000006"][1:]
        return labels, int(mask[9, 3]), Vocabulary.load(split / "vocabulary.json")

    ours = Vocabulary.load(lip.VOCABULARY)
    assert build("ignore") == ([0], 65535, ours)
    labels, value, vocabulary = build("class")
    assert (labels, value, vocabulary.names[TORSO]) == ([0, TORSO], TORSO, "torso skin")
    union = LabelSpace.union({"lip": ours, "cihp": vocabulary})
    assert len(union.vocabulary) == 21 and union.to_union["cihp"][TORSO] == 20
    assert np.array_equal(np.delete(union.to_union["cihp"], TORSO), np.delete(range(20), TORSO))


def test_every_value(lip, tmp_path, picture_files):
    path = tmp_path / "map.png"
    picture_files[1](path, np.array([[*range(20), 255]]))
    assert lip.read_mask(str(path)).tolist() == [[*range(20), 65535]]
    without = lip.read_mask(str(path), without_torso_skin=True)
    assert without.tolist() == [[*range(10), 65535, *range(11, 20), 65535]]


def test_the_full_count_is_not_complained_about(lip, lip_root, options, monkeypatch, capsys):
    monkeypatch.setitem(lip.COUNTS, "lip", {"val": 1})
    lip.build(lip.Lip(lip_root(), options(), splits=("val",)))
    assert "val: 1 images\n" in capsys.readouterr().out


def test_what_is_missing_or_wrong_is_named(lip, lip_root, cihp_root, options, draw, tmp_path):
    recipe = lip.Lip(lip_root(), options(), splits=("val",))

    def build(**changes):
        lip.build(dataclasses.replace(recipe, **changes))

    with pytest.raises(ValueError, match=r"no list of images .*val_id.txt; give --root"):
        build(root=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"--torso-skin class: LIP has no torso skin"):
        build(torso_skin="class")
    with pytest.raises(ValueError, match=r"no folder .*Validation/Images"):
        build(root=tmp_path / "nothing", dataset="cihp")
    image, mask = (
        recipe.root / folder / kind / f"{NAMES['val'][0]}{suffix}"
        for folder, kind, suffix in zip(
            LAYOUTS["doubled"], ("val_images", "val_segmentations"), (".jpg", ".png"), strict=True
        )
    )
    draw(image, mask, 20)
    with pytest.raises(ValueError, match=r"10005_205677.png: value\(s\) \[20\] are no class"):
        build()
    mask.unlink()
    with pytest.raises(ValueError, match=r"'10005_205677' has no .*10005_205677.png"):
        build()
    image.unlink()
    with pytest.raises(ValueError, match=r"'10005_205677' has no .*10005_205677.jpg"):
        build()
    (cihp_root / "Validation/Category_ids/0000006.png").unlink()
    with pytest.raises(ValueError, match=r"'0000006' has no .*Category_ids/0000006.png"):
        build(root=cihp_root, dataset="cihp")


def test_the_classes_and_the_pairs_that_a_flip_exchanges(lip, load_recipe):
    ours = Vocabulary.load(lip.VOCABULARY)
    assert len(ours) == 20 and (ours.uids[0], ours.names[13]) == ("background", "face")
    pairs = shipped.recipe("lip").LEFT_RIGHT  # as a job gets it
    assert pairs == lip.LEFT_RIGHT
    numbers = [tuple(ours.index(uid) for uid in pair) for pair in pairs]
    assert numbers == [(14, 15), (16, 17), (18, 19)]
    names = [name for name in ours.names if name.startswith(("left", "right"))]
    assert names == [ours.names[number] for pair in numbers for number in pair]
    ade = Vocabulary.load(load_recipe("ade20k").VOCABULARIES / "ade20k_847.json")
    voc = Vocabulary.load(load_recipe("voc2012").VOCABULARY)
    union = LabelSpace.union({"lip": ours, "ade": ade, "voc": voc})
    shared = [
        ours.names[local] for local in range(20) if ours.uids[local] in (*ade.uids, *voc.uids)
    ]
    assert shared == ["background", "hat", "sunglasses", "coat", "pants", "scarf", "skirt"]
    assert union.vocabulary.names[:20] == ours.names
