"""The kinds of files and command lines that come from outside: how a whole one is made, what reads
it, and what is right.

A damaged file is read right if what is still whole in it is read as it was. So nothing is asked of
a sample whose bytes are hit where no checksum guards them (JPEG, WebP, text), but that of its size.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import toy_job
from data.made import NUM_CLASSES, SPACE, VOCABULARY, blocks, encoded, write
from datasets.conftest import load
from fuzz.mutations import damage, damage_png, damage_tar_header, damage_tree
from pictures import jpeg
from PIL import Image
from train.shards import larvseg_config, write_squares
from train.tiny import Tiny, tiny_config

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import Clock
from memseg_dist.cli import main
from memseg_dist.config import EngineConfig, from_json, to_json
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.cache import ShardCache
from memseg_dist.data.decode import MASK_IGNORE, CorruptSample, encode_mask
from memseg_dist.data.files import read_text
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source
from memseg_dist.data.order import Draw
from memseg_dist.data.reader import Reader
from memseg_dist.data.source import SourceReader, open_index
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.jsonable import encode
from memseg_dist.memory.layouts import Rings
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Overwrite
from memseg_dist.methods.method import MethodConfig
from memseg_dist.pipeline import parse
from memseg_dist.stages import read_by, resolved
from memseg_dist.tools.build import BuildOptions
from memseg_dist.tools.external import index_external
from memseg_dist.tools.predict import read_image
from memseg_dist.tools.recipe import Skipped, image_sample
from memseg_dist.tools.search import PublishedRows
from memseg_dist.tools.shards import finish, write_parquet
from memseg_dist.tools.splits import open_pool
from memseg_dist.tools.verify import verify
from memseg_dist.train.checkpoint import Checkpoint, latest, save
from memseg_dist.train.checkpoint import load as load_checkpoint
from memseg_dist.train.engine import TorchEngine

RIGHT, SKIPPED = "right", "skipped"


class Kind(ABC):
    """path: the damaged file. what: what was done to it."""

    path: Path
    what: str

    def __init__(self, folder: Path) -> None:
        """folder: empty, and the kind's own."""
        self.folder = folder

    @abstractmethod
    def damage(self, random: Random) -> None:
        """Write a damaged file."""

    @abstractmethod
    def read(self) -> str:
        """RIGHT or SKIPPED, ValueError for a file that is refused; any other error is a failure."""

    def is_named(self, message: str) -> bool:
        """Whether a message says which file is meant."""
        return str(self.path) in message

    def empty_folder(self, name: str) -> Path:
        """One without what the case before left in it."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name

    def index(self, root: Path, make: bool = True) -> Index:
        """Of the shards in a folder, as if seen for the first time."""
        if make:
            index_external(root, VOCABULARY)
        return Index.open(root, self.empty_folder("cache"))

    def reader(self, index: Index) -> Reader:
        return Reader(index, ShardCache(self.folder / "cache", 1 << 20), SPACE.ids("masks"))


def says(read: Any, text: Any) -> bool:
    """Whether what was read is what a JSON text says, where it says anything."""
    if isinstance(text, dict):
        is_there = isinstance(read, dict) and text.keys() <= read.keys()
        return is_there and all(says(read[key], value) for key, value in text.items())
    if isinstance(text, list):
        return isinstance(read, list) and len(read) == len(text) and all(map(says, read, text))
    return read == text and isinstance(read, bool) == isinstance(text, bool)


def tar(members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive without its end mark."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
        size = archive.offset
    return buffer.getvalue()[:size]


def sample(key: str, members: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", content) for extension, content in members.items()]


# ------------------------------------------------------------------------------------------- tar


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
        self.whole = [key for key, part in parts.items() if part in whole]
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


# ----------------------------------------------------------------------------------- image, mask


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


# ------------------------------------------------------------------------------- labels in shards


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


# --------------------------------------------------------------------------------------- parquet


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


def filled_bank() -> ShardedRows:
    bank = ShardedRows(Rings(4, 2), Overwrite(), 3)
    for step in range(3):
        bank.propose([0, 2, 3 - step], torch.arange(9.0).view(3, 3) + 100 * step, Clock(step))
        bank.commit(Clock(step))
    return bank


class Bank(Kind):
    """A published memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        filled_bank().publish(folder / "bank", ["n0", "n1", "n2", "n3"])
        (self.path,) = (folder / "bank").iterdir()
        self.whole = self.path.read_bytes()
        self.expected = PublishedRows.open(self.path.parent)

    def damage(self, random: Random) -> None:
        content, self.what = damage(self.whole, random)
        self.path.write_bytes(content)

    def read(self) -> str:
        found = PublishedRows.open(self.path.parent)
        for name, expected in vars(self.expected).items():
            assert np.array_equal(getattr(found, name), expected), name
        return RIGHT


# ---------------------------------------------------------------------------- classes and tables


class Text(Kind):
    """A file of text or JSON: `whole` has its forms, `check` gets what it says now."""

    whole: tuple[bytes, ...]

    def damage(self, random: Random) -> None:
        content = random.choice(self.whole)
        if content[:1] in (b"{", b"[") and random.random() < 0.6:
            content, self.what = damage_tree(json.loads(content), random)
        else:
            content, self.what = damage(content, random)
            if random.random() < 0.1:
                content, self.what = b"\xef\xbb\xbf" + content, f"{self.what}, with a mark"
        self.write(content)

    def write(self, content: bytes) -> None:
        self.path.write_bytes(content)

    def lines(self) -> list[str]:
        return [*filter(str.strip, self.path.read_bytes().decode("utf-8-sig").splitlines())]


CATEGORIES = (Category("n0", "cat", ("kitty",)), Category("n1", "dog"), Category("n2", "Löwe"))


class VocabularyFile(Text):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "vocabulary.json"
        Vocabulary(CATEGORIES).save(self.path)
        self.whole = (self.path.read_bytes(),)

    def read(self) -> str:
        assert says(Vocabulary.load(self.path).to_json(), json.loads(self.path.read_bytes()))
        return RIGHT


class ClassList(Text):
    """A class's place is its id: the names are those of the lines, in their order."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names = ["cat", "dog", "traffic light", "Löwe"]
        table = "cat\tn02121620\tkitty, true cat\ndog\r\n\ntraffic light\tn06874185\nLöwe\n"
        self.whole = (table.encode(), json.dumps(names).encode(),
                      json.dumps({"classes": names}).encode())  # fmt: skip

    def write(self, content: bytes) -> None:
        self.path = self.folder / f"classes.{'json' if content[:1] in (b'{', b'[') else 'txt'}"
        super().write(content)

    def read(self) -> str:
        names = [*load("folder").read_classes(self.path).names]
        if self.path.suffix == ".txt":
            assert names == [line.split("\t")[0].strip() for line in self.lines()]
        else:
            text = json.loads(self.path.read_bytes())
            assert names == (text["classes"] if isinstance(text, dict) else text)
        return RIGHT


class Recipe(Text):
    """What lists pictures with their labels: of an entry that is still whole the sample is made."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "images").mkdir()
        for number in range(5):
            (folder / "images" / f"{number}.jpg").write_bytes(jpeg(number))

    def build(self, recipe: Callable[..., Any], **settings: Any) -> dict[str, set[str]]:
        """Key -> names of its classes, of the shards that were built."""
        out = self.empty_folder("out")
        load("folder").build(recipe(options=BuildOptions(out, workers=0), **settings))
        index = self.index(out, make=False)
        return {
            index.key(row): {index.vocabulary.names[label] for label in index.labels(row)}
            for row in range(len(index))
        }


class Table(Recipe):
    LABELS = {"0.jpg": ["cat"], "1.jpg": ["dog", "cat"], "2.jpg": [], "3.jpg": ["traffic light"],
              "4.jpg": ["cat"]}  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        rows = "".join(f"{file},{';'.join(labels)}\n" for file, labels in self.LABELS.items())
        self.whole = (rows.encode(), f"path,labels\r\n{rows}".encode(),
                      json.dumps(self.LABELS).encode(),
                      json.dumps([*self.LABELS.items()]).encode())  # fmt: skip

    def write(self, content: bytes) -> None:
        self.path = self.folder / f"table.{'json' if content[:1] in (b'{', b'[') else 'csv'}"
        super().write(content)

    def read(self) -> str:
        images = self.folder / "images"
        found = self.build(load("folder").Table, table=self.path, images=images)
        if self.path.suffix == ".csv":
            rows = [*csv.reader(self.lines())]
            entries = [
                (row[0], row[1].split(";") if row[1] else []) for row in rows if len(row) > 1
            ]
        else:
            text = json.loads(self.path.read_bytes())
            entries = [*text.items()] if isinstance(text, dict) else text
        for file, labels in self.LABELS.items():
            if (file, labels) in entries or [file, labels] in entries:
                assert found[file.removesuffix(".jpg")] == set(labels), file
        return RIGHT


class IndexJson(Recipe):
    CLASSES = ["cat", "dog", "lamp"]
    IMAGES = [
        {"file": f"{n}.jpg", "split": "train" if n else "val", "labels": [n % 3, 1]}
        for n in range(5)
    ]
    SINGLES = [
        {"file": f"{n}.jpg", "split": "train", "name": ("cat", "sea_lion")[n % 2],
         "coco80": (0, None)[n % 2]}
        for n in range(5)
    ]  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "index.json"
        trees = (
            {"classes": self.CLASSES, "ignore": 255, "images": self.IMAGES,
             "proposal": {"base": [0, 1], "novel": [2], "note": "x"}},
            {"coco80_classes": self.CLASSES, "images": self.SINGLES},
        )  # fmt: skip
        self.whole = tuple(json.dumps(tree).encode() for tree in trees)

    def read(self) -> str:
        found = self.build(load("folder").IndexJson, index=self.path, split="train")
        text = json.loads(self.path.read_bytes())
        classes = text.get("classes") or text["coco80_classes"]
        for image in (*self.IMAGES, *self.SINGLES):
            if image in text["images"] and image["split"] == "train":
                if "labels" in image:
                    expected = {classes[label] for label in image["labels"]}
                else:
                    is_listed = image["coco80"] is not None
                    expected = {classes[image["coco80"]] if is_listed else "sea lion"}
                assert found[image["file"].removesuffix(".jpg")] == expected, image
        return RIGHT


class SplitList(Text):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write(folder / "shards", (4,))
        (folder / "shards" / "splits").mkdir()
        self.path = folder / "shards" / "splits" / "half.txt"
        self.whole = (b"image0002\nimage0000\n", b"image0003\r\n\r\nimage0001\r\n")

    def read(self) -> str:
        source = Source("masks", str(self.folder / "shards"), "masks", split="half")
        index = open_index(source, self.folder / "cache")
        assert [*index.all_keys()] == sorted(line.strip() for line in self.lines())
        return RIGHT


# ------------------------------------------------------------------------- configs, checkpoints


class Config(Text):
    """The config of a run with each of the methods, as a checkpoint keeps it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "config.json"
        config = larvseg_config(Path("/data"), Path("/runs"))
        self.whole = tuple(
            to_json(replace(config, method=kind())).encode() for kind in MethodConfig.kinds.values()
        )

    def read(self) -> str:
        config = from_json(read_text(self.path), str(self.path))
        assert says(encode(config), json.loads(self.path.read_bytes()))
        assert from_json(to_json(config)) == config
        return RIGHT


class CheckpointFiles(Kind):
    """A file of a checkpoint, with or without a manifest that fits the damage."""

    LABELS = LabelSpace.union({"source0": Vocabulary(CATEGORIES)})

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        engine = TorchEngine(Tiny(), tiny_config(), torch.device("cpu"))
        bank = filled_bank()
        directory = str(folder / "run")
        save(directory, 7, engine, {"bank": bank}, tiny_config(), self.LABELS, keep=1)
        self.step = folder / "run" / "step-00000007"
        self.files = {file.name: file.read_bytes() for file in self.step.iterdir()}
        self.expected = (engine.state().weights, bank.digest(values=True))

    def damage(self, random: Random) -> None:
        for name, content in self.files.items():
            (self.step / name).write_bytes(content)
        name = random.choice([*self.files, "manifest.json"])
        self.path, content = self.step / name, self.files[name]
        is_tree = name.endswith(".json") and random.random() < 0.7
        content, self.what = (
            damage_tree(json.loads(content), random) if is_tree else damage(content, random)
        )
        self.what = f"{name}: {self.what}"
        self.path.write_bytes(content)
        self.is_sealed = name != "manifest.json" and random.random() < 0.6
        if self.is_sealed:
            manifest = json.loads(self.files["manifest.json"])
            entry = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
            manifest["files"][name] = entry
            (self.step / "manifest.json").write_text(json.dumps(manifest))

    def is_named(self, message: str) -> bool:
        return str(self.step) in message

    def read(self) -> str:
        is_torn = latest(str(self.step.parent)) is None  # then a warning names it
        try:
            self.load()
        except ValueError as error:
            if is_torn and self.is_named(str(error)):
                return SKIPPED
            raise
        assert not is_torn
        return RIGHT

    def load(self) -> None:
        engine = TorchEngine(Tiny(), tiny_config(), torch.device("cpu"))
        bank = ShardedRows(Rings(4, 2), Overwrite(), 3)
        checkpoint = Checkpoint(str(self.step))
        step = load_checkpoint(checkpoint, engine, {"bank": bank}, tiny_config(), self.LABELS)
        if not self.is_sealed:
            weights, digest = self.expected
            assert step == json.loads((self.step / "manifest.json").read_bytes())["step"]
            assert bank.digest(values=True) == digest
            for name, tensor in engine.state().weights.items():
                assert torch.equal(tensor, weights[name]), name


# --------------------------------------------------------------------------------- command lines


class CommandLine(Kind):
    """Words of which some are wrong. A message names one of them."""

    STRANGE = ("", "nan", "inf", "-inf", "-1", "0", "1e400", "9" * 25, "..", "../..", "\0", "é",
               "\udcff", "a" * 300, "--", "None", "True", "1/0", "1/3", ",", "[1]", "{}", "pipe:x",
               "nope://x/y", "2", "0.5", "-")  # fmt: skip

    def damaged_words(self, words: list[str], random: Random) -> list[str]:
        words, told = [*words], []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            at, other = random.randrange(1, len(words)), random.randrange(1, len(words))
            strange = random.choice(self.STRANGE)
            kind = random.choice(
                ("replace", "replace", "remove", "insert", "swap", "twice", "spell")
            )
            told.append(f"{kind} {at} {words[at][-30:]!r} {strange[:9]!r}")
            if kind == "replace":
                words[at] = strange
            elif kind == "remove" and len(words) > 2:
                del words[at]
            elif kind == "insert":
                words.insert(at, strange)
            elif kind == "swap":
                words[at], words[other] = words[other], words[at]
            elif kind == "twice":
                words.insert(at, words[at])
            else:
                words[at] += random.choice("xs-")
        self.what = f"{words[:2]}: {', '.join(told)}"
        return words

    def is_named(self, message: str) -> bool:
        words = {word.lstrip("-") for word in self.words}
        flags = {word.replace("-", "_") for word in words}
        return any(word in message or repr(word) in message for word in words | flags if word)


class Commands(CommandLine):
    """`memseg`: exit status 1 with a message, 2 with what tyro says, or what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name, num_classes, with_masks in (("masks", 2, 1), ("weak", 4, 0), ("val", 4, 1)):
            write_squares(folder / name, 4, num_classes, with_masks=bool(with_masks))
        config = larvseg_config(folder, folder / "runs", engine=EngineConfig("torch"))
        space = build_label_space(config)
        method = build_method(config, space)
        engine = TorchEngine(method, config, torch.device("cpu"))
        run = str(folder / "runs" / "run")
        save(f"{run}/checkpoints", 5, engine, method.state(), config, space, keep=1)
        filled_bank().publish(folder / "bank", ["n0", "n1", "n2", "n3"])
        self.picture = folder / "one.jpg"
        self.picture.write_bytes(jpeg(0, (20, 16)))
        val, picture = str(folder / "val"), str(self.picture)
        split = f"data split {val} 2 1/2 --seeds 0 1 --rule nested"
        self.lines = [
            split,
            split,
            f"data split {val} 2 --name small --overwrite",
            f"data verify {val}",
            f"data index {val}",
            f"predict {picture} --checkpoint {run} --out out --resize 24 16 --keep-ratio True "
            "--mode slide --window 16 --stride 8 --scales 0.5 1.0 --flip True --classes red,sun",
            f"eval --checkpoint {run} --out out --max-images 1 --panels 1 --device cpu",
            f"bank search --checkpoint {run} --bank {folder}/bank --like sun --neighbours 3",
            f"bank inspect --checkpoint {run} --show 2 --classes sun --out out",
        ]

    def damage(self, random: Random) -> None:
        self.path = self.empty_folder("here") / "deep"
        self.path.mkdir()
        shutil.rmtree(self.folder / "val" / "splits", ignore_errors=True)
        self.words = self.damaged_words(random.choice(self.lines).split(), random)

    def read(self) -> str:
        before = os.getcwd()
        os.chdir(self.path)  # what is written without a whole path
        try:
            main(self.words)
        except SystemExit as stopped:
            if isinstance(stopped.code, str):
                assert stopped.code.startswith("error: ")
                raise ValueError(stopped.code) from stopped
            assert stopped.code in (0, 2)
            if stopped.code == 2:
                raise ValueError(" ".join(self.words)) from stopped  # tyro has shown its own
        finally:
            os.chdir(before)
        for file in (self.folder / "val" / "splits").glob("*.txt"):
            keys = file.read_text().split()
            assert 0 < len(set(keys)) == len(keys) <= 4, file
        for file in self.folder.rglob("one.labels.png"):
            with Image.open(file) as image:
                assert image.size == (20, 16)
        return RIGHT


class JobFlags(CommandLine):
    """The flags of a job: what it says is what the stages get."""

    LINE = (
        "--smoke --name toy --storage runs --seed 3 --train.steps 8 --train.optimizer.lr 0.1 "
        "--train.sources.0.slots 2 --train.sources.0.augment.crop 32 --train.every.log 2 "
        "--train.optimizer.betas 0.9 0.99 --launch.workers 1 --until tune --tune.backbone.name x"
    )

    def damage(self, random: Random) -> None:
        self.path = self.folder
        self.words = self.damaged_words(["job", *self.LINE.split()], random)[1:]

    def read(self) -> str:
        try:
            options, stages = parse(toy_job.Options, toy_job.stages, "", self.words)
            options.select([*stages])
        except SystemExit as stopped:
            assert stopped.code in (0, 2)
            raise ValueError(" ".join(self.words)) from stopped
        for name in stages:
            read_by(stages[name])
        for stage in resolved(stages).values():
            if hasattr(stage, "steps"):
                assert from_json(to_json(stage)) == stage
        return RIGHT


KINDS: dict[str, tuple[type[Kind], ...]] = {
    "tar": (OthersShard, OwnShard),
    "image": (Picture,),
    "mask": (Mask, LabelMap),
    "json": (Labels,),
    "parquet": (IndexRows, IndexPart, Bank),
    "vocabulary": (VocabularyFile, ClassList),
    "table": (Table, IndexJson, SplitList),
    "config": (Config,),
    "manifest": (CheckpointFiles,),
    "command": (Commands, JobFlags),
}
"""Of each kind its forms."""
