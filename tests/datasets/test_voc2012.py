"""VOC 2012 and SBD on miniatures of their official folders: palette PNGs, XML, MATLAB files."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
from PIL import Image

from memseg_dist.cli import main
from memseg_dist.data.index import Index
from memseg_dist.data.source import Source, open_index
from memseg_dist.data.vocabulary import LabelSpace, Vocabulary

CAT, DOG, PERSON = 8, 12, 15
TRAIN, VAL = ["2007_000032", "2007_000039"], ["2007_000033"]
SBD_TRAIN, SBD_VAL = ["2008_000002", "2007_000032"], ["2008_000003", "2007_000033"]


@pytest.fixture
def voc(load_recipe):
    return load_recipe("voc2012")


def write_xml(path, names):
    """An annotation; the first object is a "difficult" one and has a part with its own name."""
    part = "<part><name>head</name></part>"
    objects = [
        f"<object><name>{name}</name><difficult>{int(not number)}</difficult>{part}</object>"
        for number, name in enumerate(names)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><folder>VOC2012</folder>{''.join(objects)}</annotation>")


def write_palette(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8)).convert("P")
    image = Image.frombytes("P", image.size, pixels.astype(np.uint8).tobytes())
    image.putpalette(np.random.default_rng(0).integers(0, 255, 768).tolist())
    image.save(path)


def pixels_of(value):
    """Background above, `value` below, an unknown line between."""
    pixels = np.zeros((12, 16), np.uint8)
    pixels[5], pixels[6:] = 255, value
    return pixels


@pytest.fixture
def root(tmp_path, picture_files):
    """Cats, which the annotations see together with a person that has no mask."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for number, name in enumerate(sorted({*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL})):
        picture_files[0](root / "JPEGImages" / f"{name}.jpg", number)
        write_xml(root / "Annotations" / f"{name}.xml", ["person", "cat", "cat"])
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in (("train", TRAIN), ("val", VAL)):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            write_palette(root / "SegmentationClass" / f"{name}.png", pixels_of(CAT))
    return root


@pytest.fixture
def augmented(root):
    """SegmentationClassAug: grey PNGs of SBD's images and of VOC's; dogs."""
    folder = root / "SegmentationClassAug"
    folder.mkdir()
    for name in {*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL}:
        Image.fromarray(pixels_of(DOG)).save(folder / f"{name}.png")
    return root


@pytest.fixture
def sbd(tmp_path):
    """benchmark_RELEASE/dataset; dogs. Masks only where scipy can write them."""
    folder = tmp_path / "benchmark_RELEASE" / "dataset"
    (folder / "cls").mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(SBD_TRAIN))
    (folder / "val.txt").write_text("\n".join(SBD_VAL))
    return folder


def write_mat(folder, name, pixels):
    savemat = pytest.importorskip("scipy.io").savemat
    fields = {"Boundaries": np.zeros((20, 1)), "Segmentation": pixels, "CategoriesPresent": [DOG]}
    savemat(folder / "cls" / f"{name}.mat", {"GTcls": fields}, do_compression=True)


def test_the_three_splits(voc, augmented, options, read_back, capsys):
    reports = voc.build(voc.Voc2012(augmented, options(verify=True)))
    assert [report.num_samples for report in reports] == [4, 2, 1]
    printed = capsys.readouterr().out
    assert "train_aug: 4 images, NOT the 10,582 of the full data set, 8 pairs" in printed
    train_aug = read_back(options().out / "train_aug")
    assert sorted(train_aug) == ["2007_000032", "2007_000039", "2008_000002", "2008_000003"]
    assert {(tuple(labels), mask is None) for _, labels, mask in train_aug.values()} == {
        ((CAT, PERSON), True)
    }
    for split, names in (("train", TRAIN), ("val", VAL)):
        written = read_back(options().out / split)
        assert sorted(written) == names
        for _, labels, mask in written.values():
            assert labels == [0, CAT, PERSON]
            assert (mask[0, 0], mask[5, 3], mask[9, 3]) == (0, 65535, CAT)
    index = Index.open(options().out / "train_aug")
    assert (index.num_masks, len(index)) == (0, 4)


def test_the_full_count_is_not_complained_about(voc, augmented, options, monkeypatch, capsys):
    monkeypatch.setattr(voc, "COUNTS", {"val": 1})
    voc.build(voc.Voc2012(augmented, options(), splits=("val",)))
    assert "val: 1 images, 2 pairs" in capsys.readouterr().out


def test_labels_from_the_masks_have_no_background(voc, augmented, options, read_back):
    recipe = voc.Voc2012(augmented, options(), labels_from="masks")
    voc.build(recipe)
    train_aug = read_back(options().out / "train_aug")
    labels = {key: (item[1], item[2]) for key, item in train_aug.items()}
    assert labels["2008_000002"] == ([DOG], None)
    assert labels["2007_000032"] == ([CAT], None)  # VOC's own mask, not SBD's
    assert [item[1] for item in read_back(options().out / "val").values()] == [[0, CAT]]


def test_masks_of_the_augmented_set(voc, augmented, options, read_back):
    recipe = voc.Voc2012(augmented, options(), splits=("train_aug",), with_masks=True)
    voc.build(recipe)
    written = read_back(options().out / "train_aug")
    assert written["2008_000002"][1] == [0, CAT, DOG, PERSON]
    assert written["2008_000002"][2][9, 3] == DOG
    assert written["2007_000039"][2][9, 3] == CAT


@pytest.mark.parametrize("with_masks", [False, True])
def test_vocs_own_list_is_a_split_of_the_augmented_set(voc, augmented, options, with_masks, capsys):
    recipe = voc.Voc2012(augmented, options(), splits=("train_aug",), with_masks=with_masks)
    voc.build(recipe)
    voc.build(recipe)  # going on with what is there
    out = options().out / "train_aug"
    assert (out / "splits/train.txt").read_text().split() == TRAIN
    assert "the split 'train' has 2 images, NOT the 1,464" in capsys.readouterr().out
    main(["data", "split", str(out), "1", "--within", "train"])
    (key,) = (out / "splits/1-seed0.txt").read_text().split()
    assert key in TRAIN
    source = Source("voc", str(out), "masks" if with_masks else "labels", split="train")
    index = open_index(source, options().out / "cache")
    assert (len(index), index.num_masks) == (2, 2 * with_masks)


def test_a_small_set_has_what_it_holds_of_the_list(voc, augmented, options):
    found = set()
    for limit in (1, 2, 3):
        choice = options(limit=limit, out=options().out / str(limit))
        voc.build(voc.Voc2012(augmented, choice, splits=("train_aug",)))
        path = choice.out / "train_aug/splits/train.txt"
        keys = path.read_text().split() if path.exists() else []
        assert {*keys} == {*TRAIN} & {*Index.open(choice.out / "train_aug").all_keys()}
        found.add(len(keys))
    assert 1 in found


def test_sbd_lists_alone_give_image_labels(voc, root, sbd, options, read_back, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io.matlab", None)  # not needed
    voc.build(voc.Voc2012(root, options(), sbd=sbd, splits=("train_aug",)))
    written = read_back(options().out / "train_aug")
    assert sorted(written) == ["2007_000032", "2007_000039", "2008_000002", "2008_000003"]
    assert {tuple(labels) for _, labels, _ in written.values()} == {(CAT, PERSON)}


def test_matlab_masks(voc, root, sbd, options, read_back):
    for name in (*SBD_TRAIN, *SBD_VAL):
        write_mat(sbd, name, pixels_of(DOG))
    recipe = voc.Voc2012(root, options(), sbd=sbd, splits=("train_aug",), with_masks=True)
    voc.build(recipe)
    written = read_back(options().out / "train_aug")
    assert len(written) == 4
    expected = pixels_of(DOG).astype(np.uint16)
    expected[expected == 255] = 65535
    assert np.array_equal(written["2008_000003"][2], expected)
    assert written["2007_000032"][2][9, 3] == CAT
    (sbd / "cls" / "2008_000002.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(ValueError, match=r"2008_000002.mat has no label map GTcls.Segmentation"):
        voc.read_mask(str(sbd / "cls" / "2008_000002.mat"))


def test_without_scipy_the_way_out_is_named(voc, sbd, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io.matlab", None)
    with pytest.raises(ValueError, match=r"pip install scipy, or put .*SegmentationClassAug"):
        voc.read_mask(str(sbd / "cls" / "2008_000002.mat"))


def test_what_is_missing_or_wrong_is_named(voc, root, augmented, sbd, options, tmp_path):
    def build(**changes):
        voc.build(dataclasses.replace(voc.Voc2012(root, options()), **changes))

    with pytest.raises(ValueError, match=r"no list of images .*give --root VOCdevkit/VOC2012"):
        build(root=tmp_path)
    with pytest.raises(ValueError, match=r"'2008_000002' has no .*2008_000002.mat"):
        build(sbd=sbd, with_masks=True)
    write_palette(root / "SegmentationClass" / f"{VAL[0]}.png", pixels_of(21))
    with pytest.raises(ValueError, match=r"2007_000033.png: value\(s\) \[21\] are no class"):
        build(splits=("val",))
    annotation = root / "Annotations" / "2008_000003.xml"
    write_xml(annotation, ["unicorn"])
    with pytest.raises(ValueError, match=r"2008_000003.xml: \['unicorn'\] are no classes"):
        build()
    annotation.write_text("<annotation>")
    with pytest.raises(ValueError, match=r"2008_000003.xml cannot be read"):
        build()
    (root / "JPEGImages" / "2007_000032.jpg").unlink()
    with pytest.raises(ValueError, match=r"train: image '2007_000032' has no .*JPEGImages"):
        build(splits=("train",))
    for path in (root / "SegmentationClassAug").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"train_aug needs SBD.*--splits train val"):
        build()


def test_classes_are_those_of_coco(voc, load_recipe):
    ours = Vocabulary.load(voc.VOCABULARY)
    coco = Vocabulary.load(load_recipe("coco2014").VOCABULARY)
    stuff = Vocabulary.load(load_recipe("coco_stuff").VOCABULARY)
    assert (len(ours), len(coco)) == (21, 81)
    assert ours.uids[0] == coco.uids[0] == "background"
    assert coco.uids[1:] == stuff.uids[:80] and coco.names[1:] == stuff.names[:80]
    assert ours.names[CAT] == "cat" and ours.names[PERSON] == "person"
    assert ours.names[1] == "aeroplane" and ours.names[20] == "tvmonitor"
    assert len(LabelSpace.union({"voc": ours, "coco": coco, "stuff": stuff})) == 172
