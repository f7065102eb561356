"""`memseg data split`: numbers, rules, lists, what is refused and what is shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from data.made import NUM_CLASSES, VOCABULARY, encoded

from memseg_dist.cli import main
from memseg_dist.data.index import Index
from memseg_dist.data.source import Source, open_index
from memseg_dist.tools.shards import Sample, finish, write_shard
from memseg_dist.tools.splits import PROTOCOLS, draw, number_of, open_pool

NAMES = [f"2007_{number:06d}" for number in range(64)]


def mask_of(number):
    """Class 0 everywhere; class 1 in half of the images, 2 in an eighth, 3 in one of 16."""
    mask = np.zeros((6, 8), np.uint16)
    for row, (label, every) in enumerate(((1, 2), (2, 8), (3, 16))):
        if number % every == 0:
            mask[row] = label
    return mask


def write(root, order=range(64), per_shard=16, with_masks=True, unmasked=()):
    """Images whose labels also have class 4, which no mask shows."""
    numbers = list(order)
    for shard, first in enumerate(range(0, len(numbers), per_shard)):
        samples = []
        for number in numbers[first : first + per_shard]:
            mask = mask_of(number) if with_masks and number not in unmasked else None
            samples.append(Sample(NAMES[number], encoded(number, 8, 6), "jpg", (4,), mask))
        write_shard(root, shard, samples, num_classes=NUM_CLASSES)
    return finish(root, VOCABULARY)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "data")
    return tmp_path / "data"


def split(*arguments):
    main(["data", "split", *map(str, arguments)])


def fails(*arguments):
    with pytest.raises(SystemExit) as stopped:
        split(*arguments)
    assert isinstance(stopped.value.code, str) and stopped.value.code.startswith("error: ")
    return stopped.value.code


def keys_of(root, name):
    return (Path(root) / "splits" / f"{name}.txt").read_text().splitlines()


def classes_shown(keys):
    return {label for key in keys for label in np.unique(mask_of(NAMES.index(key))).tolist()}


def test_published_numbers():
    """Shares are rounded up; what that does not give a protocol says in numbers."""
    for name, protocol in PROTOCOLS.items():
        ours = {size: number_of(size, protocol.num_images) for size in protocol.counts}
        if name == "voc-aug":
            assert ours.pop("1/20") == 530
            assert {**ours, "1/20": 529} == protocol.counts
        else:
            assert ours == protocol.counts
    assert number_of("92", 1464) == 92 and number_of("3/4", 10) == 8
    for size in ("0", "11", "1/0", "0/3", "2/1", "-1", "half", "0.5", "1/16 "):
        with pytest.raises(ValueError, match=r"size .*(neither a number|of 10 images; ask)"):
            number_of(size, 10)


def test_nested_splits_lie_in_each_other_whatever_the_shards(root, tmp_path, capsys):
    split(root, "1/16", "1/4", "30", "--seeds", 0, 1)
    assert [len(keys_of(root, f"{size}-seed0")) for size in ("1_16", "1_4", "30")] == [4, 16, 30]
    printed = " ".join(capsys.readouterr().out.split())
    assert "1_16-seed0" in printed and "6 splits are in" in printed
    for seed in (0, 1):
        small, middle, large = (keys_of(root, f"{n}-seed{seed}") for n in ("1_16", "1_4", "30"))
        assert large[:16] == middle and middle[:4] == small and len({*large}) == 30
    assert keys_of(root, "1_4-seed0") != keys_of(root, "1_4-seed1")
    other = tmp_path / "other"
    write(other, np.random.default_rng(0).permutation(64).tolist(), per_shard=7)
    split(other, "1/4")
    assert keys_of(other, "1_4-seed0") == keys_of(root, "1_4-seed0")
    source = Source("x", str(other), "masks", split="1_4-seed0")
    assert {*open_index(source, tmp_path / "cache").all_keys()} == {*keys_of(root, "1_4-seed0")}


def test_every_class_occurs_in_independent_draws(root):
    split(root, "6", "12", "--rule", "every-class", "--seeds", *range(6))
    for number in ("6", "12"):
        drawn = [keys_of(root, f"{number}-seed{seed}") for seed in range(6)]
        assert all(classes_shown(keys) == {0, 1, 2, 3} for keys in drawn)
        assert all(len({*keys}) == int(number) for keys in drawn)
        assert len({tuple(keys) for keys in drawn}) == 6
    assert not {*keys_of(root, "6-seed0")} <= {*keys_of(root, "12-seed0")}
    split(root, "6", "--seeds", *range(6), "--overwrite")  # by the other rule: not all of them
    nested = [classes_shown(keys_of(root, f"6-seed{seed}")) for seed in range(6)]
    assert any(shown != {0, 1, 2, 3} for shown in nested)


def test_every_class_draws_of_two_sizes_and_seeds_are_independent(tmp_path):
    """Also where the first draw of each has every class already."""
    write(tmp_path, with_masks=False)
    pool = open_pool(Index.open(tmp_path))
    small, large, other = (
        draw(pool, n, "every-class", seed) for n, seed in ((8, 0), (16, 0), (8, 1))
    )
    assert not {*small} <= {*large} and {*small} != {*other}


def test_classes_that_never_come_are_named(tmp_path):
    """Class 3 is in one image that shows nothing else of classes 1 and 2."""
    masks = [np.full((6, 8), label, np.uint16) for label in (0, 1, 2, 3)]
    samples = [
        Sample(NAMES[n], encoded(n, 8, 6), "jpg", (), masks[n % 4 if n < 4 else 0])
        for n in range(40)
    ]
    write_shard(tmp_path, 0, samples, num_classes=NUM_CLASSES)
    finish(tmp_path, VOCABULARY)
    message = fails(tmp_path, "3", "--rule", "every-class")
    assert "none of 1,000 draws of 3 images shows all 4 classes" in message
    assert "'class 3' (" in message and "'class 4'" not in message and "--rule nested" in message
    assert not (tmp_path / "splits").exists()


def test_only_images_with_masks_are_drawn(tmp_path):
    write(tmp_path / "some", unmasked=range(32))
    split(tmp_path / "some", "1/2", "32")
    assert len(keys_of(tmp_path / "some", "1_2-seed0")) == 16
    assert {*keys_of(tmp_path / "some", "32-seed0")} == {*NAMES[32:]}
    assert "size 33 is 33 of 32 images" in fails(tmp_path / "some", "33")
    write(tmp_path / "none", with_masks=False)
    split(tmp_path / "none", "1/4", "--rule", "every-class")
    assert len(keys_of(tmp_path / "none", "1_4-seed0")) == 16


def test_what_a_pool_shows_is_in_its_masks(root, tmp_path):
    pool = open_pool(Index.open(root))
    assert pool.counts(np.arange(64)).tolist() == [64, 32, 8, 4, 0, 0]
    assert pool.counts(np.array([0, 2, 3])).tolist() == [3, 2, 1, 1, 0, 0]
    assert pool.keys == tuple(NAMES)
    write(tmp_path / "none", with_masks=False)
    labels = open_pool(Index.open(tmp_path / "none")).counts(np.arange(64))
    assert labels.tolist() == [0, 0, 0, 0, 64, 0]


def test_the_table_names_the_rarest(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    split(root, "64", "--name", "all")
    printed = capsys.readouterr().out
    assert "class 3 (4), class 2 (8), class 1 (32)" in printed and "4 of 4" in printed
    assert sorted(keys_of(root, "all")) == NAMES


def test_a_split_is_not_replaced_by_accident(root):
    split(root, "8", "--name", "mine")
    before = keys_of(root, "mine")
    split(root, "8", "--name", "mine")  # the same keys are no reason to complain
    assert keys_of(root, "mine") == before
    message = fails(root, "9", "--name", "mine")
    assert (
        "splits/mine.txt is there with other keys; give another --name, or --overwrite" in message
    )
    split(root, "12")
    (root / "splits/12-seed0.txt").write_text("x\n")
    assert "12-seed0.txt is there" in fails(root, "11", "12")
    assert not (root / "splits/11-seed0.txt").exists()  # all or none
    split(root, "9", "--name", "mine", "--overwrite")
    assert len(keys_of(root, "mine")) == 9


LISTS = {
    "keys": "{key}",
    "files": "JPEGImages/{key}.jpg",
    "pairs": "/JPEGImages/{key}.jpg /SegmentationClassAug/{key}.png",
    "cityscapes": "leftImg8bit/train/aachen/{key}_leftImg8bit.png gtFine/train/{key}_gt.png",
}


@pytest.mark.parametrize("style", LISTS)
def test_official_lists(root, tmp_path, style):
    path = tmp_path / "official.txt"
    chosen = [NAMES[number] for number in (9, 3, 60, 7)]
    path.write_text("\n".join(LISTS[style].format(key=key) for key in chosen) + "\n\n")
    split(root, "--keys", path)
    assert keys_of(root, "official") == chosen
    split(root, "1/2", "3", "--keys", path)
    assert keys_of(root, "1_2-official") == chosen[:2]
    assert keys_of(root, "3-official") == chosen[:3]


def test_lists_with_other_endings_and_folders_in_keys(tmp_path):
    samples = [Sample(key, encoded(0, 8, 6), "jpg") for key in ("a/x", "b/x", "c/y_image")]
    write_shard(tmp_path, 0, samples, num_classes=NUM_CLASSES)
    finish(tmp_path, VOCABULARY)
    path = tmp_path / "list.txt"
    path.write_text("b/x.png\nc/y_image.jpg\n")
    split(tmp_path, "--keys", path)
    assert keys_of(tmp_path, "list") == ["b/x", "c/y_image"]
    path.write_text("a/x.png\nb/x_rgb.png\nnobody\n")
    message = fails(tmp_path, "--keys", path, "--name", "other")
    assert "2 of its 3 lines are no key of" in message and "['b/x_rgb.png', 'nobody']" in message
    assert "keys such as 'a/x'" in message and "--suffixes" in message
    write(tmp_path / "data")
    path.write_text(f"{NAMES[5]}_rgb.png\n")
    split(tmp_path / "data", "--keys", path, "--suffixes", "_depth", "_rgb")
    assert keys_of(tmp_path / "data", "list") == [NAMES[5]]
    path.write_text(f"{NAMES[5]}\nimages/{NAMES[5]}.jpg\n")
    assert "split twice: 1 keys are named twice" in fails(
        tmp_path / "data", "--keys", path, "--name", "twice"
    )


def test_within_a_split(root):
    (root / "splits").mkdir()
    (root / "splits/train.txt").write_text("\n".join(NAMES[8:40]))
    split(root, "1/2", "--within", "train")
    keys = keys_of(root, "1_2-seed0")
    assert len(keys) == 16 and {*keys} <= {*NAMES[8:40]}
    assert "there is no split" in fails(root, "4", "--within", "nobody")


def test_protocols(root, monkeypatch):
    message = fails(root, "--protocol", "voc")
    assert "--protocol voc is of 1,464 images, but here are 64" in message
    assert "--within" in message and "--within" not in fails(root, "--protocol", "coco")
    small = replace(PROTOCOLS["voc"], num_images=64, counts={"1/4": 17, "1/2": 31})
    monkeypatch.setitem(PROTOCOLS, "voc", small)
    split(root, "--protocol", "voc")
    for seed in (0, 1, 2):
        assert len(keys_of(root, f"1_4-seed{seed}")) == 17
        assert len(keys_of(root, f"1_2-seed{seed}")) == 31
        expected = draw(open_pool(Index.open(root)), 17, "every-class", seed)
        assert keys_of(root, f"1_4-seed{seed}") == expected


def test_no_split_is_written_to_a_url(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    fsspec.filesystem("memory").put(f"{root}/", "/to_split/", recursive=True)
    message = fails("memory://to_split", "4")
    assert "cannot write to the URL memory://to_split/splits/4-seed0.txt" in message
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give sizes of the splits (92 or 1/16), --protocol or --keys"),
        (("4", "--protocol", "voc"), "--protocol goes without --sizes"),
        (("--protocol", "voc", "--rule", "nested"), "--protocol goes without --rule"),
        (("--keys", "a.txt", "--rule", "nested"), "--keys goes without --rule"),
        (("--keys", "a.txt", "--seeds", "3"), "--keys goes without --seeds"),
        (("--keys", "a.txt"), "cannot read a.txt"),
        (("4", "5", "--name", "x"), "--name x is one name for 2 splits"),
        (("4", "--name", "a/b"), "--name 'a/b' must be a word"),
        (("4", "--name", "a b"), "--name 'a b' must be a word"),
        (("4", "--name", "a.txt"), "--name 'a.txt' must be a word"),
        (("many",), "size 'many' is neither a number of images (92) nor a share (1/16)"),
    ],
)
def test_what_is_refused(root, arguments, message):
    assert message in fails(root, *arguments)
    assert not (root / "splits").exists()
