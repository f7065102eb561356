"""What every kind of file has in common: how it is damaged and read, and what is right."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from data.made import SPACE, VOCABULARY
from fuzz.mutations import damage, damage_tree

from memseg_dist.data.cache import ShardCache
from memseg_dist.data.index import Index
from memseg_dist.data.reader import Reader
from memseg_dist.tools.external import index_external

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


class Text(Kind):
    """A file of text or JSON. whole: what may be damaged."""

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
