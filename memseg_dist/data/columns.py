"""Parquet index -> files that every process maps, batch by batch of rows, in bounded memory.

An Arrow file has the rows; the labels, which samplers read as a whole, are two flat files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memseg_dist.data import files
from memseg_dist.data.schema import (
    FORMATS,
    INDEX_NAME,
    MAX_MEMBER_BYTES,
    VOCABULARY_NAME,
    arrow_schema,
)

LAYOUT = 4  # raise it when the files change
FACTS_NAME = "facts.json"
ROWS_NAME = "rows.arrow"
_BATCH_ROWS = 65536


@dataclasses.dataclass
class Facts:
    """What is known of an index as a whole, kept beside its rows."""

    root: str
    vocabulary: str
    num_labels: int = 0
    num_masks: int = 0
    num_unreadable: int = 0
    max_label: int = -1
    pixels: dict[str, int] = dataclasses.field(default_factory=dict)
    shard_sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def convert(index_path: str, root: str, folder: Path, keys: Sequence[str] | None = None) -> None:
    """index.parquet -> the files of `Index`, in bounded memory; the folder appears whole.

    keys: of the samples that are taken; None: all.
    """
    temporary = files.temporary_beside(folder)
    temporary.mkdir()
    facts = Facts(root, index_path.removesuffix(INDEX_NAME) + VOCABULARY_NAME)
    try:
        _copy(temporary, facts, index_path, keys)
        (temporary / FACTS_NAME).write_text(json.dumps(dataclasses.asdict(facts)))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_rows(
    index_path: str, num_rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """An index's rows, so many at a time. ValueError naming the file for any damage that shows."""
    names = arrow_schema().names if columns is None else [*columns]
    with files.open_binary(index_path) as stream, reading_parquet(index_path):
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        check_columns(parquet.schema_arrow, index_path)
        for batch in parquet.iter_batches(num_rows, columns=names):
            batch.validate(full=True)
            _check_values(batch, index_path)
            yield batch


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A file that fits into memory. ValueError naming it for any damage that shows."""
    with reading_parquet(path):
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
        table.validate(full=True)
        return table


@contextlib.contextmanager
def reading_parquet(path: str | Path) -> Iterator[None]:
    """ValueError naming a file that Arrow cannot read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}); write it again"
        ) from error


def _check_values(batch: pa.RecordBatch, index_path: str) -> None:
    """ValueError for an empty cell, and for a number that none of these columns can hold."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values = column.flatten() if pa.types.is_list(column.type) else column
        if column.null_count or values.null_count:
            raise ValueError(f"{index_path}: {name!r} has empty cells; write it again")
        if not pa.types.is_integer(values.type) or not len(values):
            continue
        low, high = pc.min_max(values).as_py().values()
        most = MAX_MEMBER_BYTES if name in ("image_size", "mask_size") else high
        if low < 0 or high > most:
            raise ValueError(f"{index_path}: {name!r} is {low} .. {high}; write it again")


def check_columns(schema: pa.Schema, index_path: str | Path) -> None:
    """ValueError unless they are those of an index."""
    for expected in arrow_schema():
        if expected.name not in schema.names or schema.field(expected.name).type != expected.type:
            found = schema.field(expected.name).type if expected.name in schema.names else "absent"
            raise ValueError(
                f"{index_path}: column {expected.name!r} is {found}, expected {expected.type}; "
                "write the index with memseg_dist.tools.shards.finish"
            )


def _copy(folder: Path, facts: Facts, index_path: str, keys: Sequence[str] | None) -> None:
    kept, num_kept = None if keys is None else pa.array(keys, pa.string()), 0
    schema = pa.schema([f for f in arrow_schema() if f.name not in ("labels", "pixels")])
    with (
        pa.OSFile(str(folder / ROWS_NAME), "wb") as sink,
        pa.ipc.new_file(sink, schema) as rows,
        open(folder / "labels_offsets", "wb") as offsets_file,
        open(folder / "labels_values", "wb") as values_file,
    ):
        np.zeros(1, np.int64).tofile(offsets_file)
        for batch in read_rows(index_path, _BATCH_ROWS):
            if kept is not None:
                batch = batch.filter(pc.is_in(batch["key"], value_set=kept))
                num_kept += len(batch)
            if not len(batch):
                continue
            columns = [batch.column(name) for name in schema.names]
            rows.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            lengths = pc.list_value_length(batch.column("labels")).to_numpy()
            values = batch.column("labels").flatten().to_numpy()
            (facts.num_labels + np.cumsum(lengths, dtype=np.int64)).tofile(offsets_file)
            values.tofile(values_file)
            facts.num_labels += len(values)
            facts.max_label = max(facts.max_label, int(values.max(initial=-1)))
            facts.num_unreadable += int((batch.column("width").to_numpy() == 0).sum())
            facts.num_masks += int((batch.column("mask_size").to_numpy() > 0).sum())
            if not pc.all(pc.is_in(batch.column("image_format"), pa.array(FORMATS))).as_py():
                raise ValueError(f"{index_path}: an image format is not one of {list(FORMATS)}")
            _count_pixels(batch, facts.pixels, index_path)
            _count_shards(batch.column("shard"), facts.shard_sizes, index_path)
    if keys is not None and num_kept != len(keys):
        raise ValueError(f"{index_path} has changed while it was read; start again")


def _count_pixels(batch: pa.RecordBatch, counts: dict[str, int], index_path: str) -> None:
    """Adds how many pixels of the masks show each label."""
    masked = batch.filter(pc.greater(pc.list_value_length(batch["pixels"]), 0))
    labels, pixels = (masked[name].flatten() for name in ("labels", "pixels"))
    if len(labels) != len(pixels):
        raise ValueError(f"{index_path}: 'pixels' does not fit 'labels'; write it again")
    by_label = pa.table({"label": labels, "pixels": pixels}).group_by("label")
    for row in by_label.aggregate([("pixels", "sum")]).to_pylist():
        label = str(row["label"])  # as JSON has it
        counts[label] = counts.get(label, 0) + row["pixels_sum"]


def _count_shards(shards: pa.Array, sizes: dict[str, int], index_path: str) -> None:
    runs = pc.run_end_encode(shards)
    lengths = np.diff(runs.run_ends.to_numpy(), prepend=0).tolist()
    for length, shard in zip(lengths, runs.values.to_pylist(), strict=True):
        if shard in sizes and shard != next(reversed(sizes)):
            raise ValueError(
                f"{index_path}: the rows of shard {shard} are not together; sort by shard"
            )
        sizes[shard] = sizes.get(shard, 0) + length
