"""Parquet index -> one flat file per column, row group by row group, in bounded memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memseg_dist.data import files
from memseg_dist.data.schema import FORMAT_CODES, INDEX_NAME, VOCABULARY_NAME, arrow_schema

LAYOUT = 1  # raise it when the flat files change
FACTS_NAME = "facts.json"
FIXED_COLUMNS = {
    "image_offset": np.int64,
    "image_size": np.int64,
    "mask_offset": np.int64,
    "mask_size": np.int64,
    "width": np.int32,
    "height": np.int32,
}
_BATCH_ROWS = 65536


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of an index as a whole, kept beside its columns."""

    root: str
    vocabulary: str
    num_rows: int
    num_labels: int
    num_masks: int
    max_label: int
    key_bytes: int
    shard_names: list[str]
    shard_sizes: list[int]


def convert(index_path: str, root: str, folder: Path) -> None:
    """index.parquet -> one flat file per column, in bounded memory; the folder appears whole."""
    temporary = files.temporary_beside(folder)
    temporary.mkdir()
    vocabulary = index_path.removesuffix(INDEX_NAME) + VOCABULARY_NAME
    try:
        with fsspec.open(index_path, "rb") as stream:
            try:
                parquet = pq.ParquetFile(stream)
                _check_columns(parquet.schema_arrow, index_path)
                with _Columns(temporary, index_path) as columns:
                    names = [name for name in arrow_schema().names if name != "pixels"]
                    for batch in parquet.iter_batches(_BATCH_ROWS, columns=names):
                        columns.append(batch)
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"{index_path} is not a readable Parquet file ({error}); write it again"
                ) from error
        facts = columns.facts(root, vocabulary)
        (temporary / FACTS_NAME).write_text(json.dumps(dataclasses.asdict(facts)))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_columns(schema: pa.Schema, index_path: str) -> None:
    for expected in arrow_schema():
        if expected.name not in schema.names or schema.field(expected.name).type != expected.type:
            found = schema.field(expected.name).type if expected.name in schema.names else "absent"
            raise ValueError(
                f"{index_path}: column {expected.name!r} is {found}, expected {expected.type}; "
                "write the index with memseg_dist.data.shards.finish"
            )


class _Columns:
    """The flat files while they are written; ragged ones are (offsets, values)."""

    def __init__(self, folder: Path, index_path: str) -> None:
        self._folder = folder
        self._index_path = index_path
        self._streams: dict[str, IO[bytes]] = {}
        self._stack = ExitStack()
        self._shard_sizes: dict[str, int] = {}
        self._last_shard: str | None = None
        self._written = {"key": 0, "labels": 0}
        self._num_rows = self._num_masks = 0
        self._max_label = -1

    def __enter__(self) -> _Columns:
        ragged = ["key_offsets", "key_bytes", "labels_offsets", "labels_values"]
        for name in [*FIXED_COLUMNS, "image_format", *ragged]:
            stream = self._stack.enter_context(open(self._folder / name, "wb"))
            self._streams[name] = stream
            if name.endswith("_offsets"):
                np.zeros(1, np.int64).tofile(stream)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def append(self, batch: pa.RecordBatch) -> None:
        for name, dtype in FIXED_COLUMNS.items():
            values = batch.column(name).to_numpy(zero_copy_only=False)
            np.ascontiguousarray(values, dtype).tofile(self._streams[name])
        codes = pc.index_in(batch.column("image_format"), pa.array(FORMAT_CODES))
        if codes.null_count:
            raise ValueError(
                f"{self._index_path}: an image format is not one of {list(FORMAT_CODES)}"
            )
        codes.to_numpy().astype(np.uint8).tofile(self._streams["image_format"])
        keys = batch.column("key").cast(pa.binary())
        self._append_ragged("key", "key_bytes", *_binary_parts(keys))
        labels = batch.column("labels")
        values = labels.flatten().to_numpy()
        self._append_ragged("labels", "labels_values", labels.offsets.to_numpy(), values)
        self._max_label = max(self._max_label, int(values.max(initial=-1)))
        self._num_masks += int((batch.column("mask_size").to_numpy() > 0).sum())
        self._num_rows += batch.num_rows
        self._count_shards(batch.column("shard"))

    def _append_ragged(self, name: str, values_name: str, offsets: Any, values: Any) -> None:
        written = self._written[name]
        shifted = offsets[1:].astype(np.int64) - offsets[0] + written
        shifted.tofile(self._streams[f"{name}_offsets"])
        values.tofile(self._streams[values_name])
        self._written[name] = written + len(values)

    def _count_shards(self, shards: pa.Array) -> None:
        runs = pc.run_end_encode(shards)
        ends = runs.run_ends.to_pylist()
        for first, end, shard in zip([0, *ends], ends, runs.values.to_pylist(), strict=False):
            if shard != self._last_shard and shard in self._shard_sizes:
                raise ValueError(
                    f"{self._index_path}: the rows of shard {shard} are not together; sort by shard"
                )
            self._shard_sizes[shard] = self._shard_sizes.get(shard, 0) + end - first
            self._last_shard = shard

    def facts(self, root: str, vocabulary: str) -> Facts:
        return Facts(
            root=root,
            vocabulary=vocabulary,
            num_rows=self._num_rows,
            num_labels=self._written["labels"],
            num_masks=self._num_masks,
            max_label=self._max_label,
            key_bytes=self._written["key"],
            shard_names=[*self._shard_sizes],
            shard_sizes=[*self._shard_sizes.values()],
        )


def _binary_parts(column: pa.Array) -> tuple[Any, Any]:
    """(offsets, the bytes between the first and the last of them)."""
    offsets = np.frombuffer(column.buffers()[1], np.int32)
    offsets = offsets[column.offset : column.offset + len(column) + 1]
    data = column.buffers()[2]
    content = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return offsets, content[offsets[0] : offsets[-1]]
