"""Lists that people write: vocabularies, classes, tables of pictures, splits."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.made import write
from datasets.conftest import load
from fuzz.kind import RIGHT, Text, says
from pictures import jpeg

from memseg_dist.data.loader import Source
from memseg_dist.data.source import open_index
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.build import BuildOptions

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
