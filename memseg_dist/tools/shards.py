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

from memseg_dist.data.columns import check_columns, read_table, reading_parquet
from memseg_dist.data.decode import (
    MASK_EXTENSION,
    MASK_IGNORE,
    CorruptSample,
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
from memseg_dist.data.vocabulary import Vocabulary

_PARQUET: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
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


def escape_key(text: str) -> str:
    """A valid key for any file name, reversible by URL unquoting."""
    return re.sub(r"[%.\\\s\x00]|^[/_]", _quoted, text)


def _quoted(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())


def as_key(name: str) -> str:
    """The key of a sample that others named: its name, escaped unless it is a key already."""
    return name if _KEY.fullmatch(name) else escape_key(name)


def shard_is_done(root: str | Path, shard_number: int) -> bool:
    """Whether `write_shard` finished this shard (its part index is written last)."""
    part, shard = Path(root) / part_name(shard_number), Path(root) / shard_name(shard_number)
    return part.exists() and shard.exists()


def write_shard(
    root: str | Path, shard_number: int, samples: Iterable[Sample], *, num_classes: int
) -> int:
    """Write `shard-NNNNNN.tar` and then its part index, each whole or not at all; its samples.

    The bytes depend on the samples alone. A shard that is done is skipped without touching
    `samples`. ValueError, naming the key, for a label or mask value outside `num_classes`, a mask
    of another size than its image, a repeated key, an image that is not of its format, or other
    samples than `index.parquet` says this shard has.
    """
    folder = make_folder(root)
    path, part = folder / shard_name(shard_number), folder / part_name(shard_number)
    if shard_is_done(folder, shard_number):
        return int(pq.read_metadata(part).num_rows)
    if not 0 < num_classes <= MASK_IGNORE:
        raise ValueError(f"num_classes is {num_classes}; it must be 1 .. {MASK_IGNORE}")
    temporary = temporary_beside(path)
    try:
        rows = _write_tar(temporary, samples, num_classes)
        if not rows:
            raise ValueError(f"shard {path}: no samples were given; leave this shard out")
        listing = [{**row, "key": key, "shard": path.name} for key, row in rows.items()]
        table = pa.Table.from_pylist(listing, schema=arrow_schema())
        _check_indexed(folder / INDEX_NAME, path, table)
        os.replace(temporary, path)
        write_parquet(part, [table])
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def _check_indexed(index_path: Path, path: Path, table: pa.Table) -> None:
    """ValueError if the index has other rows of the shard: until `finish` it would be of the old
    tar.
    """
    if not index_path.exists():
        return
    with reading_parquet(index_path):
        old = pq.read_table(index_path, filters=[("shard", "==", path.name)])
    if len(old) and not old.equals(table):
        raise ValueError(
            f"shard {path} is in {INDEX_NAME} with other samples; give the new ones another shard "
            "number, or write the whole data set to another folder"
        )


def _write_tar(
    path: Path, samples: Iterable[Sample], num_classes: int
) -> dict[str, dict[str, Any]]:
    """What the index says of each sample, by key."""
    from webdataset import TarWriter

    rows: dict[str, dict[str, Any]] = {}
    with open(path, "wb") as stream:
        with TarWriter(stream, encoder=False, mtime=0) as writer:
            for sample in samples:
                if sample.key in rows:
                    raise ValueError(f"key {sample.key!r} is given twice in one shard")
                try:
                    row, members = _row_and_members(sample, num_classes)
                except ValueError as error:
                    raise ValueError(f"sample {sample.key!r}: {error}") from error
                for extension, content in sorted(members.items()):
                    writer.write({"__key__": sample.key, extension: content})
                    padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if extension != "json":
                        what = "mask" if extension == MASK_EXTENSION else "image"
                        row[f"{what}_offset"] = writer.tarstream.offset - padded
                        row[f"{what}_size"] = len(content)
                rows[sample.key] = row
        stream.flush()
        os.fsync(stream.fileno())
    return rows


def _row_and_members(sample: Sample, num_classes: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    mask = sample.mask
    if not _KEY.fullmatch(sample.key):
        raise ValueError(
            "a key must not hold '.', '\\' or white space, nor start with '/' or '_'; use "
            "escape_key(name)"
        )
    if "labels" in sample.extra:
        raise ValueError("extra must not hold 'labels'; give them as Sample.labels")
    if mask is not None and (mask.dtype != np.uint16 or mask.ndim != 2):
        raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}; it must be uint16 [H, W]")
    size = open_image(sample.image, sample.image_format).size
    row = sample_row(size, sample.image_format, mask, sample.labels, num_classes)
    value = {"labels": row["labels"], **sample.extra}
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    members = {row["image_format"]: sample.image, "json": text.encode()}
    if mask is not None:
        members[MASK_EXTENSION] = encode_mask(mask)
    return row, members


def sample_row(
    size: tuple[int, int],
    image_format: str,
    mask: NDArray[np.uint16] | None,
    labels: Iterable[int],
    num_classes: int,
) -> dict[str, Any]:
    """What the index says of a sample, but for its key, its shard and where its members lie.

    size: (width, height) of the image, (0, 0) if it cannot be read.
    ValueError for a label or mask value outside `num_classes`, CorruptSample for a mask of another
    size than the image.
    """
    width, height = size
    pixels: dict[int, int] = {}
    if mask is not None:
        if mask.shape != (height, width):
            raise CorruptSample(
                f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels but the image is "
                f"{width} x {height}; write masks at the image's size"
            )
        values, counts = np.unique(mask[mask != MASK_IGNORE], return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    present = sorted({*pixels, *(int(label) for label in labels)})
    for label in present:
        if not 0 <= label < num_classes:
            raise ValueError(
                f"label {label} is outside the vocabulary of {num_classes} classes "
                f"(0 .. {num_classes - 1}; {MASK_IGNORE} marks unknown mask pixels)"
            )
    return {
        "image_format": "jpg" if image_format == "jpeg" else image_format,
        "mask_offset": 0,
        "mask_size": 0,
        "width": width,
        "height": height,
        "labels": present,
        "pixels": [] if mask is None else [pixels.get(label, 0) for label in present],
    }


def write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    """An index of these tables, whole or not at all."""
    temporary = temporary_beside(path)
    try:
        with pq.ParquetWriter(temporary, arrow_schema(), **_PARQUET) as writer:
            for table in tables:
                writer.write_table(table)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finish(root: str | Path, vocabulary: Vocabulary) -> Index:
    """Merge the part indexes into `index.parquet` and write `vocabulary.json`.

    Rows are sorted by shard. Shards of an earlier `finish` are kept, so a data set can grow and a
    killed `finish` can be repeated; the vocabulary may grow too, by classes after its last one.
    ValueError if there is nothing to merge, a shard is missing, a label lies outside the vocabulary
    or two samples share a key.
    """
    folder = make_folder(root)
    parts = sorted(folder.glob(f"shard-*{PART_SUFFIX}"))
    index_path = folder / INDEX_NAME
    tables = {part.name.removesuffix(PART_SUFFIX) + ".tar": part for part in parts}
    old = _opened(index_path) if index_path.exists() else None
    if not parts and old is None:
        raise ValueError(f"{folder}: no shards to index; write some with write_shard first")
    for name in tables:
        if not (folder / name).exists():
            raise ValueError(f"{folder}: shard {name} is missing although its index is here")
    if old is not None:
        _check_grown(folder / VOCABULARY_NAME, vocabulary)
    _check_keys_and_labels([*parts, *([index_path] if old else [])], tables, vocabulary, folder)
    vocabulary.save(folder / VOCABULARY_NAME)
    try:
        if parts:
            write_parquet(index_path, _merged(tables, old, index_path))
        for part in parts:
            part.unlink()
    except OSError as error:
        raise unwritable(index_path, error) from error
    return Index.open(folder)


def _opened(path: Path) -> pq.ParquetFile:
    with reading_parquet(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def _merged(
    parts: dict[str, Path], old: pq.ParquetFile | None, old_path: Path
) -> Iterable[pa.Table]:
    """Row groups by shard name; a new part replaces the old rows of its shard."""
    groups: dict[str, list[int]] = {name: [] for name in parts}
    if old is not None:
        with reading_parquet(old_path):
            for group in range(old.num_row_groups):
                shards = old.read_row_group(group, columns=["shard"])["shard"]
                for shard in shards.unique().to_pylist():
                    groups.setdefault(shard, []).append(group)
    for shard in sorted(groups):
        if old is None or shard in parts:
            table = read_table(parts[shard])
            check_columns(table.schema, parts[shard])
            yield table
            continue
        for group in groups[shard]:
            with reading_parquet(old_path):
                table = old.read_row_group(group)
            yield table.filter(pc.equal(table["shard"], shard))


def _check_grown(path: Path, vocabulary: Vocabulary) -> None:
    """ValueError unless the classes that indexed labels count keep their ids."""
    old, new = Vocabulary.load(path).uids, vocabulary.uids
    for class_id, uid in enumerate(old):
        if new[class_id : class_id + 1] != (uid,):
            found = repr(new[class_id]) if class_id < len(new) else "absent"
            raise ValueError(
                f"{path}: class {class_id} is {uid!r}, but {found} in the new vocabulary; keep the "
                "classes that are there in their order and add new ones at the end"
            )


def _check_keys_and_labels(
    paths: list[Path], parts: dict[str, Path], vocabulary: Vocabulary, folder: Path
) -> None:
    keys: list[pa.Array] = []
    for path in paths:
        table = read_table(path, ["key", "labels", "shard"])
        if path.name == INDEX_NAME:
            table = table.filter(
                pc.invert(pc.is_in(table["shard"], pa.array([*parts], pa.string())))
            )
        highest = pc.max(pc.list_flatten(table["labels"])).as_py()
        if highest is not None and highest >= len(vocabulary):
            raise ValueError(
                f"{path}: label {highest} is outside the vocabulary of {len(vocabulary)} classes; "
                "finish with the vocabulary that the shards were written for"
            )
        keys += table["key"].chunks
    check_keys(keys, folder)


def check_keys(keys: list[pa.Array], where: str | Path) -> None:
    """ValueError naming a key that comes twice."""
    chunked = pa.chunked_array(keys, type=pa.string())
    if pc.count_distinct(chunked).as_py() != len(chunked):
        counts = chunked.value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise ValueError(
            f"{where}: key {twice!r} is given to two samples; every one needs a key of its own"
        )
