"""Shards, their index, and what is in them: tar, image, mask, JSON, Parquet."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from data.made import NUM_CLASSES, SPACE, VOCABULARY, blocks, encoded, write
from datasets.conftest import load
from fuzz.kind import RIGHT, SKIPPED, Kind, sample, tar
from fuzz.mutations import damage, damage_png, damage_tar_header, damage_tree
from pictures import jpeg
from PIL import Image

from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.decode import MASK_IGNORE, CorruptSample, encode_mask
from memseg_dist.data.loader import Source
from memseg_dist.data.order import Draw
from memseg_dist.data.source import SourceReader
from memseg_dist.tools.predict import read_image
from memseg_dist.tools.recipe import Skipped, image_sample
from memseg_dist.tools.shards import finish, write_parquet
from memseg_dist.tools.splits import open_pool
from memseg_dist.tools.verify import verify


class OthersShard(Kind):
    """A shard without an index: a sample that is still whole in it is indexed as it was."""

    SAMPLES = {
        "dir/0": ({"jpg": encoded(0, 9, 8), "cls": b"1"}, (1,)),
        "dir/1": ({"png": encoded(1, 9, 8, "PNG"), "json": b'{"labels": [2, "n3"]}'}, (2, 3)),
        "long/" * 22 + "2": ({"webp": encoded(2, 9, 8, "WEBP"), "cls": b"0"}, (0,)),
        "dir/3": ({"jpeg": encoded(3, 12, 9), "mask.png": encode_mask(blocks(3, 12, 9))},
                  tuple(np.setdiff1d(blocks(3, 12, 9), MASK_IGNORE).tolist())),
        "dir/4": ({"jpg": encoded(4, 9, 8), "txt": b"left alone", "cls": b"5"}, (5,)),
    }  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "shards" / "0.tar"

    def damage(self, random: Random) -> None:
        format = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        parts = {key: tar(sample(key, members), format) for key, (members, _) in
                 self.SAMPLES.items()}  # fmt: skip
        content = b"".join(parts.values()) + bytes(random.choice((1024, 10240)))
        if random.random() < 0.3:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                headers = [at for file in archive for at in {file.offset, file.offset_data - 512}]
            at = random.choice(headers)
            content, self.what = damage_tar_header(content, at, random)
            whole = content[:at]  # a size that is believed may swallow what follows
        else:
            content, self.what = damage(content, random)
            whole = content
        self.whole = [
            key for key, part in parts.items()
            if part in whole and not is_swallowed(content, content.index(part))
        ]  # fmt: skip
        self.empty_folder("shards")
        self.path.write_bytes(content)

    def read(self) -> str:
        index = self.index(self.path.parent)
        rows = {row.key: row for row in map(index.row, range(len(index)))}
        content = self.path.read_bytes()
        for key in self.whole:
            members, labels = self.SAMPLES[key]
            image = content[rows[key].image_offset :][: rows[key].image_size]
            assert image in members.values() and rows[key].labels == labels and rows[key].width
        return SKIPPED if index.num_unreadable else RIGHT


def is_swallowed(archive: bytes, place: int) -> bool:
    """Whether a header before byte `place` is of a file that goes on beyond it."""
    for at in range(0, place, tarfile.BLOCKSIZE):
        with contextlib.suppress(tarfile.HeaderError):
            header = tarfile.TarInfo.frombuf(archive[at : at + 512], "utf-8", "surrogateescape")
            if at + tarfile.BLOCKSIZE + header.size > place:
                return True
    return False


class OwnShard(Kind):
    """A shard that was damaged after it was indexed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.opened = write(folder / "shards", (3,))
        self.path = folder / "shards" / "shard-000000.tar"
        self.whole = self.path.read_bytes()
        reader = self.reader(self.opened)
        self.expected = [reader.read(row, True) for row in range(3)]

    def damage(self, random: Random) -> None:
        content, self.what = damage(self.whole, random)
        self.path.write_bytes(content)

    def read(self) -> str:
        self.opened.check_shards()
        reader, num_skipped = self.reader(self.opened), 0
        for row, expected in enumerate(self.expected):
            try:
                found = reader.read(row, True)
            except CorruptSample as error:
                assert self.is_named(str(error))
                num_skipped += 1
                continue
            assert found.labels == expected.labels and found.image.shape == expected.image.shape
            assert torch.equal(found.mask, expected.mask)
        try:
            assert len(verify(self.path.parent)) == 3 and num_skipped == 0
        except ValueError as error:
            assert self.is_named(str(error))
            if not num_skipped:
                raise
        return SKIPPED if num_skipped else RIGHT


class Picture(Kind):
    """A picture alone, and as one of two samples of a source that skips."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
        self.whole = {name: encoded(1, image_format=of) for name, of in formats.items()}
        self.pixels = {}
        for name, content in self.whole.items():
            (folder / f"whole.{name}").write_bytes(content)
            self.pixels[name] = read_image(folder / f"whole.{name}")

    def damage(self, random: Random) -> None:
        name = random.choice([*self.whole])
        is_sealed = name == "png" and random.random() < 0.5
        content, self.what = (damage_png if is_sealed else damage)(self.whole[name], random)
        self.expected = self.pixels["png"] if name == "png" and not is_sealed else None
        self.path = self.folder / f"picture.{name}"
        self.path.write_bytes(content)
        members = sample("0", {"jpg": self.whole["jpg"], "cls": b"1"})
        members += sample("1", {name: content, "cls": b"2"})
        (self.empty_folder("shards") / "0.tar").write_bytes(tar(members) + bytes(1024))

    def read(self) -> str:
        root = self.folder / "shards"
        index = self.index(root)
        source = Source("labels", str(root), "labels", 1, 2, AugmentConfig((40, 30), crop=16),
                        on_corrupt="skip")  # fmt: skip
        batch = SourceReader(source, SPACE, 0, self.folder / "cache", 1 << 20).batch(
            [Draw(0, 0, 0), Draw(1, 0, 0)]
        )
        assert batch.valid[0].any() and batch.labels[0] == (1,)
        content = self.path.read_bytes()
        for_recipe = image_sample("1", content, ())
        try:
            pixels = read_image(self.path)
        except ValueError as error:
            assert self.is_named(str(error)) and (batch.skipped, batch.labels[1]) == (1, ())
            return SKIPPED
        assert (batch.skipped, batch.labels[1]) == (0, (2,)) and not isinstance(for_recipe, Skipped)
        assert pixels.shape == (3, index.row(1).height, index.row(1).width)
        assert self.expected is None or torch.equal(pixels, self.expected)
        return RIGHT


class Mask(Kind):
    """The mask of one of two samples of a shard without an index."""

    OTHERS = {
        "of another size": np.zeros((31, 40), np.uint16),
        "of values outside": np.full((30, 40), NUM_CLASSES, np.uint16),
        "of 8 bits": np.zeros((30, 40), np.uint8),
        "of colours": np.zeros((30, 40, 3), np.uint8),
        "of one bit": np.zeros((30, 40), bool),
        "without known pixels": np.full((30, 40), MASK_IGNORE, np.uint16),
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "shards" / "0.tar"

    def damage(self, random: Random) -> None:
        values = blocks(random.randrange(50))
        content, kind = (
            encode_mask(values),
            random.choice(("damaged", "damaged", "sealed", "other")),
        )
        self.expected: np.ndarray | None = values
        if kind == "damaged":
            content, self.what = damage(content, random)
        elif kind == "sealed":
            content, self.what = damage_png(content, random)
            self.expected = None
        else:
            self.what = random.choice([*self.OTHERS])
            self.expected = self.OTHERS[self.what]
            content = encode_mask(self.expected)
        members = sample("0", {"jpg": encoded(0), "mask.png": encode_mask(blocks(0)), "cls": b"1"})
        members += sample("1", {"jpg": encoded(1), "mask.png": content, "cls": b"2"})
        self.empty_folder("shards")
        self.path.write_bytes(tar(members) + bytes(1024))

    def read(self) -> str:
        index = self.index(self.path.parent)
        reader = self.reader(index)
        assert np.array_equal(reader.read_mask(0), blocks(0).astype(np.int16))
        try:
            mask = reader.read(1, True).mask
        except CorruptSample as error:
            assert self.is_named(str(error)) and index.num_unreadable == 1
            return SKIPPED
        assert index.num_unreadable == 0 and mask.shape == (30, 40) and mask.max() < NUM_CLASSES
        assert self.expected is None or np.array_equal(mask, self.expected.astype(np.int16))
        return RIGHT


class LabelMap(Kind):
    """A label map of 8 bits, as recipes read it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "map.png"
        self.values = np.where(blocks(1) == MASK_IGNORE, 255, blocks(1)).astype(np.uint8)
        grey = Image.fromarray(self.values)
        palette = Image.fromarray(self.values, "P")
        palette.putpalette(bytes(range(256)) * 3)
        self.whole = []
        for image in (grey, palette):
            image.save(self.path)
            self.whole.append(self.path.read_bytes())

    def damage(self, random: Random) -> None:
        self.is_sealed = random.random() < 0.5
        accident = damage_png if self.is_sealed else damage
        content, self.what = accident(random.choice(self.whole), random)
        self.path.write_bytes(content)

    def read(self) -> str:
        read_label_map = load("folder").read_label_map
        mask = read_label_map(str(self.path), NUM_CLASSES, first_value=0, ignore=(255,))
        expected = self.values.astype(np.uint16)
        expected[expected == 255] = MASK_IGNORE
        assert mask.dtype == np.uint16 and (self.is_sealed or np.array_equal(mask, expected))
        return RIGHT


class Labels(Kind):
    """What a sample of others has for labels: each is one that its text names."""

    TREES = ({"labels": [0, 3]}, {"label": "n5", "caption": "x"}, {"cls": 1}, [0, "n4"], 3, "n2",
             {"caption": {"labels": 1}})  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "shards" / "0.tar"
        self.image = jpeg()

    def damage(self, random: Random) -> None:
        tree = random.choice(self.TREES)
        text, self.what = (damage_tree(tree, random) if random.random() < 0.6 else
                           damage(json.dumps(tree).encode(), random))  # fmt: skip
        self.text, self.extension = text, random.choice(("json", "cls"))
        members = {"jpg": self.image, self.extension: text}
        self.empty_folder("shards")
        self.path.write_bytes(tar(sample("0", members)) + bytes(1024))

    def read(self) -> str:
        labels = self.index(self.path.parent).row(0).labels
        value = json.loads(self.text)
        if isinstance(value, dict) and self.extension == "json":
            value = next((value[key] for key in ("labels", "label", "cls") if key in value), [])
        named = value if isinstance(value, list) else [value]
        assert set(labels) == {_class_id(label) for label in named}
        return RIGHT


def _class_id(label: Any) -> int:
    if isinstance(label, str):
        return VOCABULARY.index(label)
    assert type(label) is int and 0 <= label < NUM_CLASSES, f"{label!r} was taken for a class"
    return label


class IndexRows(Kind):
    """The index of our own shards."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write(folder / "shards", (5, 3, 4))
        self.path = folder / "shards" / "index.parquet"
        self.whole = self.path.read_bytes()
        self.expected = self.rows()

    def damage(self, random: Random) -> None:
        content, self.what = damage(self.whole, random)
        self.path.write_bytes(content)

    def rows(self) -> Any:
        index = self.index(self.path.parent, make=False)
        pool = open_pool(index)
        pairs = [*zip(pool.image.tolist(), pool.label.tolist())]
        rows = [*map(index.row, range(len(index)))]
        return rows, [*index.all_keys()], pool.keys, pairs, str(index)

    def read(self) -> str:
        assert self.rows() == self.expected
        return RIGHT


class IndexPart(IndexRows):
    """The index of a shard before `finish`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index_file, self.merged = self.path, self.whole
        self.path = folder / "shards" / "shard-000001.index.parquet"
        write_parquet(self.path, [pq.read_table(self.index_file).slice(5, 3)])
        self.whole = self.path.read_bytes()

    def read(self) -> str:
        self.index_file.write_bytes(self.merged)
        finish(self.path.parent, VOCABULARY)
        return super().read()
