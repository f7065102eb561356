"""Drawing splits of a data set: which of its images are labelled in a run.

    n-th split of seed s, rule "nested":       the first n of permutation(s) of the sorted keys
                          rule "every-class":  the first n of permutation(s, n, try), of the first
                                               try in which every class of the set occurs

So nested splits of one seed lie in each other, and neither depends on how the shards are cut. A
share of the images is rounded up: that gives the published counts of VOC (1464 / 16 -> 92), COCO
(118287 / 32 -> 3697) and Cityscapes (2975 / 30 -> 100), but not those of Three-stage's VOC
(10582 / 20 -> 530, published: 529), which its protocol states as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memseg_dist.batch import derive_seed
from memseg_dist.data.columns import read_rows
from memseg_dist.data.files import exists, read_text, write_atomically
from memseg_dist.data.index import Index
from memseg_dist.data.order import permutation
from memseg_dist.data.splits import is_path, read_split, split_path
from memseg_dist.tools.shards import escape_key

Rule = Literal["nested", "every-class"]

_TRIES = 1000
_SIZE = re.compile(r"(\d+)(?:/(\d+))?")


@dataclass(frozen=True)
class Protocol:
    """A paper's splits: its number of images, how many of them each share is, and how drawn."""

    num_images: int
    counts: Mapping[str, int]
    rule: Rule
    seeds: tuple[int, ...]


PROTOCOLS = {
    "voc": Protocol(
        1_464, {"1/2": 732, "1/4": 366, "1/8": 183, "1/16": 92}, "every-class", (0, 1, 2)
    ),
    "voc-aug": Protocol(
        10_582, {"1/100": 106, "1/50": 212, "1/20": 529, "1/8": 1_323}, "nested", (0,)
    ),
    "coco": Protocol(
        118_287,
        {"1/32": 3_697, "1/64": 1_849, "1/128": 925, "1/256": 463, "1/512": 232},
        "nested",
        (0,),
    ),
    "cityscapes": Protocol(
        2_975, {"1/30": 100, "1/8": 372, "1/4": 744, "1/2": 1_488}, "nested", (0,)
    ),
}
"""PseudoSeg's VOC and COCO, Three-stage's VOC and, of both, Cityscapes. PseudoSeg's VOC splits are
independent draws, of which those of 1/16 were drawn until every class occurred."""


@dataclass(frozen=True)
class Pool:
    """The images that can be drawn, by key, and which classes each of them shows.

    image, label: int64 [P], a pair per image and class that it shows; ascending by image.
    """

    keys: tuple[str, ...]
    image: NDArray[np.int64]
    label: NDArray[np.int64]
    class_names: tuple[str, ...]

    def counts(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [C]: how many of these images show each class."""
        chosen = np.zeros(len(self.keys), dtype=bool)
        chosen[images] = True
        return np.bincount(self.label[chosen[self.image]], minlength=len(self.class_names))


def open_pool(index: Index, within: str | None = None) -> Pool:
    """The images of the data set or of its split `within`; if any has a mask, those that have one.

    What an image shows is what is in its mask, or without masks its image labels.
    """
    part = index if within is None else index.only(read_split(index.root, within))
    columns = ["key", "mask_size", "width", "labels", "pixels"]
    table = pa.Table.from_batches(read_rows(index.parquet, 65536, columns))
    rows = index.rows_of([*part.all_keys()])
    rows = rows[table["width"].to_numpy()[rows] > 0]
    if part.num_masks:
        rows = rows[table["mask_size"].to_numpy()[rows] > 0]
    table = table.take(np.sort(rows)).sort_by("key")
    labels = table["labels"].combine_chunks()
    image = np.repeat(np.arange(len(table)), np.diff(labels.offsets.to_numpy()))
    label = labels.flatten().to_numpy().astype(np.int64)
    if part.num_masks:
        pixels = table["pixels"].combine_chunks()
        if pixels.offsets != labels.offsets:
            raise ValueError(f"{index.parquet}: 'pixels' does not fit 'labels'; write it again")
        is_shown = pixels.flatten().to_numpy() > 0
        image, label = image[is_shown], label[is_shown]
    return Pool(tuple(table["key"].to_pylist()), image, label, index.vocabulary.names)


def number_of(size: str, num_images: int) -> int:
    """How many of `num_images` a size such as "92" or "1/16" is, shares rounded up."""
    found = _SIZE.fullmatch(size)
    if not found or int(found[2] or 1) == 0:
        raise ValueError(f"size {size!r} is neither a number of images (92) nor a share (1/16)")
    number = int(found[1]) if found[2] is None else -(-num_images * int(found[1]) // int(found[2]))
    if not 0 < number <= num_images:
        raise ValueError(
            f"size {size} is {number} of {num_images} images; ask for 1 .. {num_images}"
        )
    return number


def draw(pool: Pool, number: int, rule: Rule, seed: int) -> list[str]:
    """The keys of a split, in the order in which they were drawn.

    ValueError naming the rarest classes if no draw shows every class of the pool.
    """
    if rule == "nested":
        images = permutation(len(pool.keys), derive_seed("split", seed))[:number]
        return [pool.keys[image] for image in images]
    wanted = pool.counts(np.arange(len(pool.keys))) > 0
    came = np.zeros(len(wanted), dtype=np.int64)
    for attempt in range(_TRIES):
        drawn = derive_seed("split", seed, number, attempt)
        images = permutation(len(pool.keys), drawn)[:number]
        shown = pool.counts(images) > 0
        if (shown == wanted).all():
            return [pool.keys[image] for image in images]
        came += shown
    rarest = sorted(np.flatnonzero(wanted).tolist(), key=lambda label: came[label])[:5]
    listed = ", ".join(f"{pool.class_names[label]!r} ({came[label]})" for label in rarest)
    raise ValueError(
        f"none of {_TRIES:,} draws of {number} images shows all {wanted.sum()} classes; the "
        f"rarest, and how many draws showed them: {listed}; ask for more images, or --rule nested"
    )


def listed_keys(path: str, index: Index, suffixes: Sequence[str]) -> list[str]:
    """The keys that a list names: a key or file name a line, of which what follows a space is left
    out. Folders, the extension and `suffixes` are no part of a key unless the shards say so.

    ValueError naming lines that the shards do not have.
    """
    lines = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    found: list[str | None] = [None] * len(lines)
    for spelled in _spellings(suffixes):
        keys = [spelled(line) for line in lines]
        for number, row in enumerate(index.rows_of(keys).tolist()):
            if row >= 0 and found[number] is None:
                found[number] = keys[number]
    missing = [line for line, key in zip(lines, found, strict=True) if key is None]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(lines)} lines are no key of {index.root}: "
            f"{missing[:3]}; the shards have keys such as {index.key(0)!r}: write these, or name "
            "what follows them in the file names by --suffixes"
        )
    return [key for key in found if key is not None]


def _spellings(suffixes: Sequence[str]) -> list[Callable[[str], str]]:
    """Functions from a line to the key that it may mean, the most literal one first."""

    def stem(line: str) -> str:
        return escape_key(PurePosixPath(line).stem)

    def without_extension(line: str) -> str:
        return escape_key(str(PurePosixPath(line).with_suffix("")))

    def without(suffix: str) -> Callable[[str], str]:
        return lambda line: stem(line).removesuffix(suffix)

    return [str, without_extension, stem, *map(without, suffixes)]


def write_splits(root: str, splits: Mapping[str, Sequence[str]], overwrite: bool) -> None:
    """ROOT/splits/NAME.txt of each name -> keys, all of them or none.

    ValueError for a name that is a path, and for one that is there with other keys.
    """
    for name, keys in splits.items():
        if not name or is_path(name) or name.split() != [name]:
            raise ValueError(f"--name {name!r} must be a word without '/' and '.txt'")
        if len({*keys}) != len(keys):
            raise ValueError(f"split {name}: {len(keys) - len({*keys})} keys are named twice")
        path = split_path(root, name)
        if not overwrite and exists(path) and read_split(root, name) != [*keys]:
            raise ValueError(
                f"{path} is there with other keys; give another --name, or --overwrite, after "
                "which runs that used it are no longer what they were"
            )
    for name, keys in splits.items():
        write_atomically(split_path(root, name), "".join(f"{key}\n" for key in keys).encode())
