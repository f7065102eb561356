"""A user's own pictures, in each of the forms; and the real sample data."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import LabelSpace, Vocabulary
from memseg_dist.methods.rca.labeller import ActivationLabeller
from memseg_dist.tools.recipe import read_pixels

COCO = Path(__file__).resolve().parents[2] / "datasets" / "vocabularies" / "coco_stuff_171.json"


@pytest.fixture
def folder(load_recipe):
    return load_recipe("folder")


@pytest.fixture
def masks(tmp_path, picture_files):
    """Two images, one in a sub-folder; masks hold 0, 1 and 255."""
    write_image, write_map, _ = picture_files
    for number, name in enumerate(("a", "deep/b")):
        write_image(tmp_path / "images" / f"{name}.jpg", number)
        pixels = np.full((12, 16), 255)
        pixels[:4], pixels[4:6] = 0, number
        write_map(tmp_path / "masks" / f"{name}.png", pixels)
    (tmp_path / "classes.txt").write_text("dog\nteapot\tmine:pot\tkettle, urn\n")
    return tmp_path


def recipe_masks(folder, root, make_options, **changes):
    inputs = (root / "images", root / "masks", root / "classes.txt")
    return folder.Masks(*inputs, make_options(verify=True), **changes)


def test_masks(folder, masks, options, read_back):
    recipe = recipe_masks(folder, masks, options, uids=COCO)
    assert folder.build(recipe).num_samples == 2
    vocabulary = Vocabulary.load(options().out / "vocabulary.json")
    assert vocabulary.uids == ("n02084071", "mine:pot")
    assert vocabulary.categories[1].synonyms == ("kettle", "urn")
    content = read_back(options().out)
    assert content["a"][1] == [0] and content["deep/b"][1] == [0, 1]
    assert content["deep/b"][2][[0, 5, 9], 0].tolist() == [0, 1, 65535]


def test_masks_as_labels_and_from_one(folder, masks, options, read_back):
    recipe = recipe_masks(folder, masks, options, first_value=1, ignore=(0, 255), labels_only=True)
    folder.build(recipe)
    assert [item[1:] for item in read_back(options().out).values()] in (
        [([], None), ([0], None)],
        [([0], None), ([], None)],
    )


def test_images_without_masks_are_unlabelled_if_asked_for(folder, masks, options, read_back):
    (masks / "masks/a.png").unlink()
    (masks / "masks/old.png").write_bytes((masks / "masks/deep/b.png").read_bytes())
    (masks / "images/c.BMP").write_bytes(b"BM")
    (masks / "images/.hidden").touch()
    report = folder.build(recipe_masks(folder, masks, options, unlabelled=True))
    assert [read_back(options().out)[key][1] for key in ("a", "deep/b")] == [[], [0, 1]]
    reasons = dict(report.skipped)
    assert reasons.pop(str(masks / "masks/old.png")) == "a mask without an image"
    assert reasons == {"c.BMP": ".BMP: none of .jpg, .jpeg, .png, .webp"}
    assert report.num_unlabelled == 1 and "1 images without a class" in str(report)


def test_masks_of_other_endings_are_found_or_reported(folder, masks, options, read_back):
    (masks / "masks/a.png").rename(masks / "masks/a.PNG")
    (masks / "masks/deep/b.png").rename(masks / "masks/deep/b.bmp")
    (masks / "images/c.jpg").symlink_to("nowhere")
    report = folder.build(recipe_masks(folder, masks, options, unlabelled=True))
    assert [read_back(options().out)[key][1] for key in ("a", "deep/b")] == [[0], []]
    broken = "a link to a file that is not there"
    assert dict(report.skipped) == {"c.jpg": broken, "deep/b.bmp": ".bmp: none of .png"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"0": "kettle", "1": None}, [1, 65535, 65535]),
        ({"0": "dog", "*": "teapot"}, [0, 1, 65535]),
        ({"1": "mine:pot", "*": None}, [65535, 1, 65535]),
    ],
)
def test_values_are_mapped_to_classes(folder, masks, options, read_back, values, expected):
    (masks / "values.json").write_text(json.dumps(values))
    folder.build(recipe_masks(folder, masks, options, values=masks / "values.json"))
    assert read_back(options().out)["deep/b"][2][[0, 5, 9], 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"0": "cow"}, r"values\.json: label 'cow' is not in the class list"),
        ({"x": "dog"}, r"values\.json: values is \['x'\]; it must be whole numbers"),
        ({"0": "dog"}, r"value\(s\) \[1\] are no class"),
    ],
)
def test_bad_values(folder, masks, options, values, message):
    (masks / "values.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        folder.build(recipe_masks(folder, masks, options, values=masks / "values.json"))


def test_bad_masks(folder, masks, options, picture_files):
    with pytest.raises(ValueError, match=r"[ab].png: value\(s\) \[255\] are no class"):
        folder.build(recipe_masks(folder, masks, options, ignore=()))
    picture_files[1](masks / "masks/a.png", np.zeros((5, 5)))
    with pytest.raises(ValueError, match="sample 'a': the mask is 5 x 5"):
        folder.build(recipe_masks(folder, masks, options))
    (masks / "masks/a.png").unlink()
    with pytest.raises(ValueError, match=r"a.jpg has no mask"):
        folder.build(recipe_masks(folder, masks, options))
    with pytest.raises(ValueError, match=r"cannot read .*classes.txt"):
        folder.build(recipe_masks(folder, masks / "nowhere", options))


@pytest.mark.parametrize(
    "content",
    ['["dog", "cat"]', '{"classes": ["dog", "cat"], "ignore": 255}', "dog\ncat\n"],
)
def test_class_lists(load_recipe, tmp_path, content):
    path = tmp_path / ("c.txt" if content[0] == "d" else "c.json")
    path.write_text(content)
    assert load_recipe("folder").read_classes(path).uids == ("name:dog", "name:cat")
    assert load_recipe("folder").read_classes(path, COCO).uids == ("n02084071", "n02121620")


def test_the_background_of_a_class_list_is_that_of_the_pseudo_labels(load_recipe, tmp_path):
    (tmp_path / "c.txt").write_text("Background\ndog\n")
    read = load_recipe("folder").read_classes(tmp_path / "c.txt")
    assert read.uids == (ActivationLabeller().background_uid, "name:dog")


def test_a_class_list_may_be_a_vocabulary(load_recipe):
    assert load_recipe("folder").read_classes(COCO) == Vocabulary.load(COCO)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "expected"), ("[1]", "expected"), ("{", "not JSON"), ('["a", "A"]', "both get")],
)
def test_bad_class_lists(load_recipe, tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe("folder").read_classes(tmp_path / "c.json")


def test_a_byte_order_mark_is_no_part_of_a_name(load_recipe, tmp_path):
    for name, text in (("c.txt", "dog\ncat\n"), ("c.json", '["dog", "cat"]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_recipe("folder").read_classes(tmp_path / name).names == ("dog", "cat")
    (tmp_path / "t.csv").write_text("path,label\na.jpg,dog\n", encoding="utf-8-sig")
    assert load_recipe("folder").read_table(tmp_path / "t.csv") == [("a.jpg", ["dog"])]
    (tmp_path / "c.txt").write_bytes("Möwe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.txt is no UTF-8 text .*; save it as UTF-8"):
        load_recipe("folder").read_classes(tmp_path / "c.txt")


def test_images_that_pillow_refuses_are_skipped_and_giant_masks_refused(
    folder, tmp_path, options, picture_files
):
    picture_files[0](tmp_path / "in" / "dog" / "good.jpg", 1)
    gamma, giant = (tmp_path / "in" / "dog" / f"{name}.png" for name in ("gamma", "giant"))
    Image.new("RGB", (4, 3)).save(gamma)
    content, chunk = gamma.read_bytes(), b"\0\0\0\0gAMA" + struct.pack(">I", zlib.crc32(b"gAMA"))
    gamma.write_bytes(content[:33] + chunk + content[33:])
    Image.new("L", (12_000, 10_000)).save(giant)
    report = folder.build(folder.Classes(tmp_path / "in", options()))
    assert report.num_samples == 1
    assert {key for key, _ in report.skipped} == {"dog/gamma", "dog/giant"}
    with pytest.raises(ValueError, match=r"mask .*giant\.png.*12000 x 10000 pixels is above the"):
        read_pixels(str(giant))


def test_what_is_left_out_is_named_and_counted(folder, tmp_path, options, picture_files, capsys):
    write_image, _, jpeg = picture_files
    for name in ("dog/1", "dog/2", "cat/1"):
        write_image(tmp_path / "in" / f"{name}.jpg")
    cut = tmp_path / "in/cat/cut.jpg"
    cut.write_bytes(jpeg(1, (64, 48))[:-300])
    (tmp_path / "in/cat/padded.jpg").write_bytes(jpeg(2) + b"appended by a camera")
    (tmp_path / "in/cow").mkdir()
    (tmp_path / "in/dog/3.tif").write_bytes(b"II*")
    report = folder.build(folder.Classes(tmp_path / "in", options()))
    assert report.num_samples == 4
    assert dict(report.images_of) == {"cat": 2, "dog": 2}
    assert {key for key, _ in report.skipped} == {"cat/cut", "dog/3.tif", "cow"}
    printed = capsys.readouterr().out
    for line in (
        "2 classes, images of each: cat 2, dog 2",
        "3 left out:",
        "data is damaged or cut",
        "1 x .tif: none of .jpg",
        "1 x a class folder without an image (such as cow)",
    ):
        assert line in printed  # fmt: skip


def test_hidden_files_and_broken_links_are_left_out(folder, tmp_path, options, picture_files):
    root = tmp_path / "in"
    for name in ("dog/1", "dog/.hidden", "dog/.thumb/1", ".ipynb_checkpoints/1"):
        picture_files[0](root / f"{name}.jpg")
    (root / "dog/2.jpg").symlink_to("nowhere")
    (root / "dog/.DS_Store").touch()
    report = folder.build(folder.Classes(root, options()))
    assert report.images_of == (("dog", 1),)
    assert dict(report.skipped) == {
        "dog/.hidden.jpg": "hidden",
        "dog/.thumb/1.jpg": "hidden",
        ".ipynb_checkpoints/1.jpg": "hidden",
        "dog/2.jpg": "a link to a file that is not there",
    }


def test_class_folders(folder, tmp_path, options, picture_files, read_back):
    for number, name in enumerate(("dog/1", "dog/2", "n02121620/1", "my_cup/1")):
        picture_files[0](tmp_path / "in" / f"{name}.jpg", number)
    folder.build(folder.Classes(tmp_path / "in", options(), uids=COCO))
    vocabulary = Vocabulary.load(options().out / "vocabulary.json")
    assert vocabulary.uids == ("n02084071", "name:my cup", "n02121620")
    labels = {key: item[1] for key, item in read_back(options().out).items()}
    assert labels == {"dog/1": [0], "dog/2": [0], "my_cup/1": [1], "n02121620/1": [2]}
    picture_files[0](tmp_path / "in" / "loose.jpg")
    with pytest.raises(ValueError, match=r"loose.jpg is in no class folder"):
        folder.build(folder.Classes(tmp_path / "in", options()))


@pytest.mark.parametrize("form", ["csv", "json"])
def test_tables(folder, tmp_path, options, picture_files, read_back, form):
    for name in ("x", "y"):
        picture_files[0](tmp_path / f"{name}.jpg")
    table = tmp_path / f"labels.{form}"
    rows = {"x.jpg": ["dog", "Hand-Bag"], "y.jpg": []}
    table.write_text(
        json.dumps(rows) if form == "json" else "path,labels\nx.jpg,dog;Hand-Bag\ny.jpg,\n"
    )
    (tmp_path / "classes.txt").write_text("purse\t\thand bag\ndog\n")
    folder.build(folder.Table(table, tmp_path, options(), classes=tmp_path / "classes.txt"))
    assert {key: item[1] for key, item in read_back(options().out).items()} == {
        "x": [0, 1],
        "y": [],
    }


def test_bad_tables(folder, tmp_path, options, picture_files):
    picture_files[0](tmp_path / "x.jpg")
    table = tmp_path / "t.csv"
    (tmp_path / "classes.txt").write_text("dog\n")

    def build(text):
        table.write_text(text)
        folder.build(folder.Table(table, tmp_path, options(), classes=tmp_path / "classes.txt"))

    with pytest.raises(ValueError, match=r"t.csv, line 2: expected path,label;label"):
        build("x.jpg,dog\nx.jpg\n")
    with pytest.raises(ValueError, match="label 'cat' is not in the class list"):
        build("x.jpg,cat\n")
    with pytest.raises(ValueError, match=r"no image .*z.jpg"):
        build("z.jpg,dog\n")
    with pytest.raises(ValueError, match=r"t.csv, line 2: unexpected end of data"):
        build('x.jpg,"dog\ny.jpg,dog\n')  # a quote that takes the other rows for labels
    with pytest.raises(ValueError, match=r"t.csv: more than one image would be 'x'"):
        build("x.jpg,dog\nx.jpg,dog\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table", {"x.jpg": [1]}, r"table.json: x.jpg.*; it must be of type str"),
        ("table", {"x.jpg": []}, r"table.json: no labels in it"),
        ("table", {"x.jpg": ["a", "A"]}, r"table.json: classes 'A' and 'a' both get uid 'name:a'"),
        ("table", [["x.jpg"]], r"table.json: .*it must be a list of 2"),
        ("index", {"classes": ["a"], "images": [7]}, r"index.json: images.0 is 7; it must be an"),
        ("index", {"classes": ["a"], "images": [{}]}, r"'images.0.file' is missing"),
        ("index", {"classes": "a", "images": []}, r"index.json: classes is 'a'; it must be a list"),
        ("index", {"classes": ["a", "b"], "images": [{"file": "x.jpg", "labels": [-1]}]},
         r"labels of 'x.jpg' is \[-1\]; it must be places in the list of 2 classes"),
        ("index", {"classes": ["a"], "images": [{"file": "x.jpg"}]}, r"name of 'x.jpg' is ''"),
    ],
)  # fmt: skip
def test_json_of_another_form_is_named(
    folder, tmp_path, options, picture_files, name, content, message
):
    picture_files[0](tmp_path / "x.jpg")
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(content))
    recipe = (folder.Table(path, tmp_path, options()) if name == "table"
              else folder.IndexJson(path, options()))  # fmt: skip
    with pytest.raises(ValueError, match=message):
        folder.build(recipe)


def test_real_coco80_and_i21k_like_share_their_classes(folder, tmp_path, options, real_data):
    """62 of COCO's 80 classes have pictures in i21k_like; 733 classes are its own."""
    limit = 40
    common = {"uids": COCO, "drop_empty_classes": True}
    pixels = folder.IndexJson(
        real_data / "coco80/index.json",
        options(out=tmp_path / "masks", limit=limit),
        split="train",
        uids=COCO,
    )
    weak = folder.IndexJson(
        real_data / "i21k_like/index.json", options(out=tmp_path / "weak", limit=limit), **common
    )
    shuffled = folder.IndexJson(
        real_data / "i21k_like/index.json",
        options(out=tmp_path / "shuffled", limit=limit),
        shuffle_labels=0,
        **common,
    )
    for recipe in (pixels, weak, shuffled):
        assert folder.build(recipe).num_samples == limit
    vocabularies = {
        name: Vocabulary.load(tmp_path / name / "vocabulary.json")
        for name in ("masks", "weak", "shuffled")
    }
    assert vocabularies["weak"] == vocabularies["shuffled"]
    space = LabelSpace.union(vocabularies)
    masks, images = (set(space.classes(name).tolist()) for name in ("masks", "weak"))
    assert (len(masks), len(masks & images), len(images)) == (80, 62, 795)
    groups = json.loads((tmp_path / "masks" / "groups.json").read_text())
    assert (len(groups["base"]), len(groups["novel"])) == (56, 24)
    assert set(groups["base"]) | set(groups["novel"]) <= set(vocabularies["masks"].uids)
    rows = [Index.open(tmp_path / name) for name in ("weak", "shuffled")]
    labels = [[tuple(index.row(i).labels) for i in range(limit)] for index in rows]
    assert labels[0] != labels[1]


def test_real_camvid(folder, options, real_data):
    root = real_data / "camvid11"
    inputs = (root / "val", root / "valannot", root / "classes.json")
    recipe = folder.Masks(*inputs, options(limit=5, verify=True), ignore=(11,))
    assert folder.build(recipe).num_samples == 5
    counts = Index.open(options().out).class_image_counts(11)
    assert counts[3] == 5  # road is in every picture
