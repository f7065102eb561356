"""Shards made by others, indexed on first use."""

import io
import os
import tarfile
from dataclasses import replace

import pytest
from data.made import SPACE, VOCABULARY, blocks, encoded, write
from webdataset import TarWriter

from memseg_dist.cli.data import index as index_command
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.decode import encode_mask
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source, TrainLoader
from memseg_dist.tools.external import ensure_indexed, index_external
from memseg_dist.tools.shards import Sample, write_shard
from memseg_dist.tools.verify import verify


def opened(root) -> Index:
    """As an entry point opens a user's path."""
    ensure_indexed([root])
    return Index.open(root)


def make_tar(path, *samples, first=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False) as writer:
        for number, members in enumerate(samples, first):
            writer.write({"__key__": f"dir/{number:03d}", **members})


def test_images_with_cls_are_indexed_on_first_use(tmp_path):
    root = tmp_path / "flowers"
    images = [encoded(number) for number in range(3)]
    make_tar(root / "train-0.tar", {"jpg": images[0], "cls": b"4"}, {"jpg": images[1], "cls": b"0"})
    make_tar(root / "train-1.tar", {"jpg": images[2], "cls": b"2"}, first=2)
    VOCABULARY.save(root / "vocabulary.json")
    index = opened(root)
    assert (root / "index.parquet").exists()
    assert [index.key(i) for i in range(3)] == ["dir/000", "dir/001", "dir/002"]
    assert [index.labels(i) for i in range(3)] == [(4,), (0,), (2,)]
    for number in range(3):
        row = index.row(number)
        content = (root / row.shard).read_bytes()
        assert content[row.image_offset : row.image_offset + row.image_size] == images[number]
    assert index.vocabulary == VOCABULARY
    assert len(verify(root)) == 3


@pytest.mark.parametrize("members", [{"cls": b"0"}, {"mask.png": encode_mask(blocks(0))}])
def test_labels_without_a_vocabulary_are_refused(tmp_path, members):
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0), **members})
    with pytest.raises(ValueError, match=r"0\.tar, sample 'dir/000': it has labels or") as raised:
        opened(tmp_path)
    example = str(raised.value).partition("numbers: ")[2].replace(", ...", "")
    (tmp_path / "vocabulary.json").write_text(example)
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0), "cls": b"0"})
    assert opened(tmp_path).vocabulary.names == ("cat",)


def test_images_alone_need_no_vocabulary(tmp_path):
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0)}, {"jpg": encoded(1), "json": b"{}"})
    index = opened(tmp_path)
    assert (len(index), len(index.vocabulary), index.max_label) == (2, 0, -1)


def test_names_that_are_no_keys_are_escaped(tmp_path):
    names = ["./a.jpg", "./v1.0/b.jpg", "my photo.jpg", "plain/c%20d.jpg", "./.jpg"]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        for number, name in enumerate(names):
            header = tarfile.TarInfo(name)
            header.size = len(encoded(number))
            tar.addfile(header, io.BytesIO(encoded(number)))
    keys = [*opened(tmp_path / "in").all_keys()]
    assert keys == ["a", "v1%2E0/b", "my%20photo", "plain/c%20d"]
    samples = [Sample(key, encoded(number), "jpg") for number, key in enumerate(keys)]
    assert write_shard(tmp_path / "out", 0, samples, num_classes=1) == 4
    assert len(verify(tmp_path / "in")) == 4


def test_shards_that_were_added_after_indexing_are_named(tmp_path):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0), "cls": b"1"})
    index_command(str(tmp_path))
    make_tar(tmp_path / "more" / "1.tar", {"jpg": encoded(1), "cls": b"2"}, first=1)
    write(tmp_path / "another", (1,))  # has an index of its own
    with pytest.raises(ValueError, match=r"1 shards are not in .*, such as .*/more/1\.tar"):
        index_command(str(tmp_path))
    with pytest.raises(ValueError, match=r"1 problems(.|\n)*/more/1\.tar: it is not in the index"):
        verify(tmp_path)
    (tmp_path / "more" / "1.tar").unlink()
    index_command(str(tmp_path))
    assert len(verify(tmp_path)) == 1
    (tmp_path / "0.tar").unlink()
    with pytest.raises(ValueError, match=r"0\.tar is missing although"):
        index_command(str(tmp_path))


def test_a_secret_in_a_url_is_refused_before_anything_keeps_it(cache):
    for attempt in (lambda url: ensure_indexed([url]), index_external, Index.open):
        with pytest.raises(ValueError, match="user, a password") as raised:
            attempt("https://me:hush@example.org/data")
        assert "hush" not in str(raised.value)
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (b'{"labels": [3, 1, 3]}', (1, 3)),
        (b'{"label": 2, "caption": "x"}', (2,)),
        (b'{"label": "n5"}', (5,)),
        (b'{"cls": 1}', (1,)),
        (b"[0, 4]", (0, 4)),
        (b"3", (3,)),
        (b'{"caption": "no labels"}', ()),
    ],
)
def test_forms_of_json_labels(tmp_path, text, labels):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    make_tar(tmp_path / "0.tar", {"jpeg": encoded(0), "json": text, "txt": b"left alone"})
    assert opened(tmp_path).labels(0) == labels


def test_masks_in_our_form_are_used(tmp_path):
    mask = blocks(3)
    VOCABULARY.save(tmp_path / "vocabulary.json")
    make_tar(tmp_path / "0.tar", {"png": encoded(0, image_format="PNG"), "cls": b"0",
                                  "mask.png": encode_mask(mask)})  # fmt: skip
    index = opened(tmp_path)
    assert index.num_masks == 1
    assert index.labels(0) == tuple(sorted({0, *mask[mask != 65535].tolist()}))


def test_labels_without_an_image_are_counted(tmp_path, caplog):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0), "cls": b"0"}, {"cls": b"1"}, {"txt": b"x"})
    assert len(opened(tmp_path)) == 1
    assert "1 keys have labels or a mask but no image" in caplog.text
    assert "'dir/001'" in caplog.text


def test_an_index_and_a_vocabulary_in_another_folder(tmp_path):
    for number, name in enumerate(("a", "c")):
        make_tar(tmp_path / "in" / f"{name}.tar", {"jpg": encoded(1), "cls": b"5"}, first=number)
    tars = [tmp_path / "in" / "a.tar", tmp_path / "in" / "c.tar"]
    path = index_external(tmp_path / "in", VOCABULARY, into=tmp_path / "out")
    assert path == tmp_path / "out" / "index.parquet"
    index = opened(tmp_path / "out")
    assert index.shard_names == [str(tar) for tar in tars]
    index.check_shards()
    assert len(verify(tmp_path / "out")) == 2


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(tmp_path, cache, monkeypatch):
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0)})
    original = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and original(path, mode))
    index = opened(tmp_path)
    assert len(index) == 1
    assert [*tmp_path.iterdir()] == [tmp_path / "0.tar"]
    assert index.parquet.startswith(str(cache))
    assert len(opened(tmp_path)) == 1


@pytest.mark.parametrize("name", ["pyd", "pkl", "pickle", "pth", "pt", "mask.PKL"])
def test_pickle_members_are_refused_by_name(tmp_path, name):
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0), "cls": b"1", name: b"\x80\x04."})
    with pytest.raises(ValueError, match=rf"0\.tar: member dir/000\.{name} is a pickle.*refused"):
        opened(tmp_path)
    assert not (tmp_path / "index.parquet").exists()


def test_a_pickle_that_was_added_to_our_shards_is_found_by_verify(tmp_path):
    write(tmp_path, (2,))
    make_tar(tmp_path / "shard-000000.tar", {"jpg": encoded(0), "pth": b"\x80"})
    with pytest.raises(ValueError, match=r"member dir/000\.pth is a pickle"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"9"}, "'dir/000': label 9 is outside the vocabulary of 6 classes"),
        ({"cls": b"dog"}, "not JSON"),
        ({"json": b'{"label": "dog"}'}, "label 'dog' is neither a class number nor a known uid"),
        ({"json": b'{"label": true}'}, "label True is neither"),
        ({"cls": b"4000000"}, "label 4000000 is outside the vocabulary of 6 classes"),
        ({"json": b"[" * 100_000}, "'dir/000': its .json: not JSON"),
    ],
)
def test_bad_labels_are_named(tmp_path, members, message):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0), **members})
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": b"no image"}, "'dir/001': not a readable JPEG"),
        ({"mask.png": encode_mask(blocks(0, 20, 30))}, "the mask is 20 x 30 pixels but the image"),
        ({"mask.png": encoded(0, image_format="PNG")}, "mask has mode 'RGB'; it must be a 16-bit"),
    ],
)
def test_unreadable_pixels_obey_on_corrupt(tmp_path, cache, caplog, members, message):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    good, bad = ({"jpg": encoded(number), "cls": b"1"} for number in range(2))
    make_tar(tmp_path / "0.tar", good, bad | members)
    index = opened(tmp_path)
    assert (len(index), index.num_unreadable, index.labels(1)) == (2, 1, (1,))
    assert "1 samples cannot be read" in caplog.text and message in caplog.text
    with pytest.raises(ValueError, match=rf"1 problems(.|\n)*{message}"):
        verify(tmp_path)
    source = Source("labels", str(tmp_path), "labels", 1, 2, AugmentConfig((64, 48), crop=32))
    with pytest.raises(
        ValueError, match=r"1 of 2 samples could not be read when they were indexed"
    ):
        TrainLoader([source], SPACE, seed=0)
    loader = TrainLoader([replace(source, on_corrupt="skip")], SPACE, seed=0)
    assert [batch.skipped for batch, _ in next(loader.steps(0, 1))] == [1]


def test_a_key_or_a_member_that_comes_twice_is_refused(tmp_path):
    for name in ("0.tar", "1.tar"):
        make_tar(tmp_path / "a" / name, {"jpg": encoded(0)})
    with pytest.raises(ValueError, match=r"/a: key 'dir/000' is given to two samples"):
        opened(tmp_path / "a")
    assert not (tmp_path / "a" / "index.parquet").exists()
    (tmp_path / "b").mkdir()
    with tarfile.open(tmp_path / "b" / "0.tar", "w") as tar:
        for number in range(2):
            header = tarfile.TarInfo("x.jpg")
            header.size = len(encoded(number))
            tar.addfile(header, io.BytesIO(encoded(number)))
    with pytest.raises(ValueError, match=r"0\.tar: member x\.jpg is there twice"):
        opened(tmp_path / "b")


def test_no_images_a_truncated_and_a_compressed_tar(tmp_path):
    make_tar(tmp_path / "0.tar", {"txt": b"x"})
    with pytest.raises(ValueError, match=r"0\.tar: no image member"):
        opened(tmp_path)
    make_tar(tmp_path / "0.tar", {"jpg": encoded(0)}, {"jpg": encoded(1)})
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[:2000])
    with pytest.raises(ValueError, match=r"0\.tar is cut short, damaged or not a plain tar"):
        opened(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b" + content)
    with pytest.raises(ValueError, match="not a plain tar"):
        opened(tmp_path)
