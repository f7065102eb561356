"""Writing a data set split as WebDataset shards with an index, and checking one.

for number, samples in enumerate(chunks):            # any process, any order, restartable
    write_shard(root, number, samples, num_classes=len(vocabulary))
finish(root, vocabulary)
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from memseg_dist.data.decode import (
    IMAGE_FORMATS,
    MASK_EXTENSION,
    MASK_IGNORE,
    encode_mask,
    open_image,
)
from memseg_dist.data.files import make_folder, temporary_beside, unwritable
from memseg_dist.data.index import Index
from memseg_dist.data.schema import (
    INDEX_NAME,
    PART_SUFFIX,
    VOCABULARY_NAME,
    arrow_schema,
    part_name,
    shard_name,
)
from memseg_dist.data.verify import VerifyReport, verify
from memseg_dist.data.vocabulary import Vocabulary

__all__ = [
    "Sample",
    "ShardReport",
    "VerifyReport",
    "escape_key",
    "finish",
    "shard_is_done",
    "verify",
    "write_shard",
]

_KEY = re.compile(r"[^./\\\s\x00_][^.\\\s\x00]*")


@dataclass(frozen=True)
class Sample:
    """One image with what is known of it.

    key: unique in the data set; no '.', no white space (`escape_key` makes one of any text).
    image: the encoded file, stored untouched. image_format: jpg, png or webp.
    labels: local ids of the classes in the image; those of the mask are added to them.
    mask: uint16 [H, W] of local ids, 65535 where unknown; None without a mask.
    extra: more JSON values to keep beside "labels".
    """

    key: str
    image: bytes
    image_format: str
    labels: tuple[int, ...] = ()
    mask: NDArray[np.uint16] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardReport:
    """skipped: the shard was whole already, so nothing was read or written."""

    path: Path
    num_samples: int
    num_bytes: int
    skipped: bool = False


def escape_key(text: str) -> str:
    """A valid key for any file name, reversible by URL unquoting."""
    escaped = re.sub(r"[%.\\\s\x00]", lambda match: f"%{ord(match[0]):02X}", text)
    return re.sub(r"^[/_]", lambda match: f"%{ord(match[0]):02X}", escaped)


def shard_is_done(root: str | Path, shard_number: int) -> bool:
    """Whether `write_shard` finished this shard (its part index is written last)."""
    part, shard = Path(root) / part_name(shard_number), Path(root) / shard_name(shard_number)
    return part.exists() and shard.exists()


def write_shard(
    root: str | Path, shard_number: int, samples: Iterable[Sample], *, num_classes: int
) -> ShardReport:
    """Write `shard-NNNNNN.tar` and then its part index, each whole or not at all.

    The bytes depend on the samples alone. A shard that is done is skipped without touching
    `samples`. ValueError, naming the key, for a label or mask value outside `num_classes`, a mask
    of another size than its image, a repeated key or an image that is not of its format.
    """
    folder = make_folder(root)
    path, part = folder / shard_name(shard_number), folder / part_name(shard_number)
    if shard_is_done(folder, shard_number):
        num_samples = pq.read_metadata(part).num_rows
        return ShardReport(path, num_samples, path.stat().st_size, skipped=True)
    if not 0 < num_classes <= MASK_IGNORE:
        raise ValueError(f"num_classes is {num_classes}; it must be 1 .. {MASK_IGNORE}")
    temporary = temporary_beside(path)
    try:
        rows = _write_tar(temporary, samples, num_classes)
        if not rows:
            raise ValueError(f"shard {path}: no samples were given; leave this shard out")
        _add_offsets(temporary, rows)
        table = pa.Table.from_pylist(
            [{**row, "shard": path.name} for row in rows.values()], schema=arrow_schema()
        )
        num_bytes = temporary.stat().st_size
        os.replace(temporary, path)
        _write_parquet(part, [table])
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return ShardReport(path, len(rows), num_bytes)


def _write_tar(
    path: Path, samples: Iterable[Sample], num_classes: int
) -> dict[str, dict[str, Any]]:
    from webdataset import TarWriter

    rows: dict[str, dict[str, Any]] = {}
    with open(path, "wb") as stream:
        with TarWriter(stream, encoder=False, mtime=0) as writer:
            for sample in samples:
                if sample.key in rows:
                    raise ValueError(f"key {sample.key!r} is given twice in one shard")
                row, members = _row_and_members(sample, num_classes)
                rows[sample.key] = row
                writer.write({"__key__": sample.key, **members})
        stream.flush()
        os.fsync(stream.fileno())
    return rows


def _row_and_members(sample: Sample, num_classes: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    where = f"sample {sample.key!r}"
    if not _KEY.fullmatch(sample.key):
        raise ValueError(
            f"{where}: a key must not hold '.', '\\' or white space, nor start with '/' or '_'; "
            "use escape_key(name)"
        )
    image_format = "jpg" if sample.image_format == "jpeg" else sample.image_format
    try:
        width, height = open_image(sample.image, image_format).size
    except ValueError as error:
        raise ValueError(f"{where}: {error}; allowed are {sorted(IMAGE_FORMATS)}") from error
    if "labels" in sample.extra:
        raise ValueError(f"{where}: extra must not hold 'labels'; give them as Sample.labels")
    labels, counts = _class_pixels(sample.mask, where)
    if sample.mask is not None and sample.mask.shape != (height, width):
        raise ValueError(
            f"{where}: the mask is {sample.mask.shape[1]} x {sample.mask.shape[0]} pixels but the "
            f"image is {width} x {height}; write masks at the image's size"
        )
    pixels = dict(zip(labels, counts, strict=True))
    labels = sorted({*labels, *(int(label) for label in sample.labels)})
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(
                f"{where}: label {label} is outside the vocabulary of {num_classes} classes "
                f"(0 .. {num_classes - 1}; {MASK_IGNORE} marks unknown mask pixels)"
            )
    text = json.dumps({"labels": labels, **sample.extra}, ensure_ascii=False, sort_keys=True)
    members = {image_format: sample.image, "json": text.encode()}
    if sample.mask is not None:
        members[MASK_EXTENSION] = encode_mask(sample.mask)
    row = {
        "key": sample.key,
        "image_format": image_format,
        "mask_offset": 0,
        "mask_size": 0,
        "width": width,
        "height": height,
        "labels": labels,
        "pixels": [] if sample.mask is None else [pixels.get(label, 0) for label in labels],
    }
    return row, members


def _class_pixels(mask: NDArray[np.uint16] | None, where: str) -> tuple[list[int], list[int]]:
    """The classes in a mask, ascending, and how many pixels each has."""
    if mask is None:
        return [], []
    if mask.dtype != np.uint16 or mask.ndim != 2:
        raise ValueError(
            f"{where}: the mask is {mask.dtype} {list(mask.shape)}; it must be uint16 [H, W]"
        )
    values, counts = np.unique(mask, return_counts=True)
    known = values != MASK_IGNORE
    return values[known].tolist(), counts[known].tolist()


def _add_offsets(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if extension in IMAGE_FORMATS:
                rows[key].update(image_offset=member.offset_data, image_size=member.size)
            elif extension == MASK_EXTENSION:
                rows[key].update(mask_offset=member.offset_data, mask_size=member.size)


def _write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    temporary = temporary_beside(path)
    try:
        with pq.ParquetWriter(temporary, arrow_schema(), compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finish(root: str | Path, vocabulary: Vocabulary) -> Index:
    """Merge the part indexes into `index.parquet` and write `vocabulary.json`.

    Rows are sorted by shard. Shards of an earlier `finish` are kept, so a data set can grow and a
    killed `finish` can be repeated. ValueError if there is nothing to merge, a shard is missing, a
    label lies outside the vocabulary or two samples share a key.
    """
    folder = make_folder(root)
    parts = sorted(folder.glob(f"shard-*{PART_SUFFIX}"))
    index_path = folder / INDEX_NAME
    tables = {part.name.removesuffix(PART_SUFFIX) + ".tar": part for part in parts}
    old = pq.ParquetFile(index_path) if index_path.exists() else None
    if not parts and old is None:
        raise ValueError(f"{folder}: no shards to index; write some with write_shard first")
    for name in tables:
        if not (folder / name).exists():
            raise ValueError(f"{folder}: shard {name} is missing although its index is here")
    if parts:
        _check_keys_and_labels([*parts, *([index_path] if old else [])], tables, vocabulary, folder)
    vocabulary.save(folder / VOCABULARY_NAME)
    try:
        if parts:
            _write_parquet(index_path, _merged(tables, old))
        for part in parts:
            part.unlink()
    except OSError as error:
        raise unwritable(index_path, error) from error
    return Index.open(folder)


def _merged(parts: dict[str, Path], old: pq.ParquetFile | None) -> Iterable[pa.Table]:
    """Row groups by shard name; a new part replaces the old rows of its shard."""
    kept: list[tuple[str, int]] = []
    for group in range(old.num_row_groups if old else 0):
        assert old is not None
        shards = old.read_row_group(group, columns=["shard"]).column(0).unique().to_pylist()
        kept += [(shard, group) for shard in shards if shard not in parts]
    for shard, group in sorted([*kept, *((shard, -1) for shard in parts)]):
        if group < 0:
            yield pq.read_table(parts[shard], schema=arrow_schema())
        else:
            assert old is not None
            table = old.read_row_group(group)
            yield table.filter(pc.equal(table["shard"], shard))


def _check_keys_and_labels(
    paths: list[Path], parts: dict[str, Path], vocabulary: Vocabulary, folder: Path
) -> None:
    keys: list[pa.Array] = []
    for path in paths:
        table = pq.read_table(path, columns=["key", "labels", "shard"])
        if path.name == INDEX_NAME:
            table = table.filter(pc.invert(pc.is_in(table["shard"], pa.array([*parts]))))
        highest = pc.max(pc.list_flatten(table["labels"])).as_py()
        if highest is not None and highest >= len(vocabulary):
            raise ValueError(
                f"{path}: label {highest} is outside the vocabulary of {len(vocabulary)} classes; "
                "finish with the vocabulary that the shards were written for"
            )
        keys += table["key"].chunks
    chunked = pa.chunked_array(keys, type=pa.string())
    if pc.count_distinct(chunked).as_py() != len(chunked):
        counts = chunked.value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise ValueError(
            f"{folder}: key {twice!r} is in two shards; every sample needs a key of its own"
        )
