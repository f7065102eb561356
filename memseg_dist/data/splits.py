"""Splits of a data set: ROOT/splits/NAME.txt, one key a line, UTF-8.

A split says which samples of the shards a source walks, so that 92 labelled images and all images
without labels are two sources of the same shards. `memseg data split` makes one.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from memseg_dist.data.files import exists, glob, join, read_text

FOLDER = "splits"
SUFFIX = ".txt"


def is_path(split: str) -> bool:
    """Whether it is the path or URL of a list, not the name of one kept with the shards."""
    return "/" in split or split.endswith(SUFFIX)


def split_name(split: str) -> str:
    """Its name, wherever its list lies."""
    return PurePosixPath(split).name.removesuffix(SUFFIX)


def split_path(root: str, split: str) -> str:
    """Where the list of `split`, a name or a path, lies; root: folder or URL of the shards."""
    return split if is_path(split) else join(root, f"{FOLDER}/{split}{SUFFIX}")


def split_names(root: str) -> list[str]:
    """The splits kept with the shards; [] where folders cannot be listed, as over https."""
    try:
        return [split_name(name) for name in glob(join(root, FOLDER), f"*{SUFFIX}")]
    except ValueError:
        return []


def read_split(root: str, split: str) -> list[str]:
    """The keys of a split, a name or a path; ValueError if it is not there or no text."""
    path = split_path(root, split)
    if not exists(path):
        raise ValueError(
            f"there is no split {path}; with the shards are {split_names(root) or 'none'}; make "
            f"one with `memseg data split {root}`"
        )
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
