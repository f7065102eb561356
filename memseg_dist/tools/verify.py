"""Reading a whole data set split and comparing it with its index."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from memseg_dist.data.columns import read_rows
from memseg_dist.data.decode import decode_image
from memseg_dist.data.files import join, open_binary
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.tools.external import Members, index_row, read_members, unindexed

_SHOWN = 20


def verify(root: str | Path) -> Index:
    """Decode every member of every shard and compare it with the index, which is returned.

    ValueError, listing the first problems, if any shard or sample is not as the index says, or a
    shard is not in it.
    """
    index = Index.open(root)
    problems = [f"shard {path}: it is not in the index" for path in unindexed(index)]
    for shard, rows in groupby(_rows(index), key=lambda row: row["shard"]):
        expected = {row["key"]: row for row in rows}
        problems += _shard_problems(join(index.root, shard), expected, index.vocabulary)
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        raise ValueError(f"{root}: {len(problems)} problems; the first ones:\n  {shown}")
    return index


def _rows(index: Index) -> Iterator[dict[str, Any]]:
    for batch in read_rows(index.parquet, 4096):
        yield from batch.to_pylist()


def _shard_problems(
    path: str, expected: dict[str, dict[str, Any]], vocabulary: Vocabulary
) -> Iterator[str]:
    seen = set()
    try:
        with open_binary(path) as stream:
            for key, members in read_members(stream, path):
                seen.add(key)
                problem = _problem(members, expected.get(key), vocabulary)
                if problem:
                    yield f"shard {path}, sample {key!r}: {problem}"
    except ValueError as error:
        yield str(error)
        if not seen:
            return
    missing = sorted(set(expected) - seen)
    if missing:
        yield f"shard {path}: {len(missing)} samples of the index are absent, e.g. {missing[0]!r}"


def _problem(
    members: Members, expected: dict[str, Any] | None, vocabulary: Vocabulary
) -> str | None:
    try:
        row = index_row(members, vocabulary)
        if row is None:
            return None  # not a sample: nothing of it is ever read
        if expected is None:
            return "it is not in the index"
        image_format = next(name for name in members if name in (row["image_format"], "jpeg"))
        decode_image(members[image_format][1], row["image_format"])
    except ValueError as error:
        return str(error)
    for name, value in row.items():
        if value != expected[name]:
            return f"its {name} is {value} but the index says {expected[name]}"
    return None
