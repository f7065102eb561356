"""Nearest neighbours in a published bank, by cosine, with FAISS.

    rows = PublishedRows.open("runs/bank")              # what `Bank.publish` wrote
    search = RowSearch(rows)
    search.nearest(queries, num_neighbours=10)          # per query a list of Neighbour

Shape letters: R published rows, C classes with rows, D channels, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("uid", "slot", "vector", "count", "last_step")


@dataclass(frozen=True)
class Neighbour:
    """A row (or, with slot -1, the mean of a class's rows) and its cosine to the query."""

    uid: str
    slot: int
    cosine: float


@dataclass(frozen=True)
class PublishedRows:
    """The rows of a bank: uid and slot of each [R], vectors float32 [R, D], last_step int64 [R]."""

    uids: NDArray[np.object_]
    slots: NDArray[np.int32]
    vectors: NDArray[np.float32]
    last_steps: NDArray[np.int64]

    @classmethod
    def open(cls, path: str | Path) -> PublishedRows:
        """Read one Parquet file, or all of a directory. ValueError if it holds no bank."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ValueError(f"no published bank at {path}: expected *.parquet of Bank.publish")
        tables = []
        for file in files:
            missing = sorted(set(COLUMNS) - set(pq.read_schema(file).names))
            if missing:
                raise ValueError(f"{file} is no published bank: it lacks the columns {missing}")
            tables.append(pq.read_table(file, columns=[*COLUMNS]))
        table = pa.concat_tables(tables).combine_chunks()
        if table.num_rows == 0:
            raise ValueError(f"the bank at {path} has no rows: nothing was committed to it yet")
        vectors = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return cls(
            uids=table["uid"].to_numpy(),
            slots=table["slot"].to_numpy(),
            vectors=np.ascontiguousarray(vectors.reshape(table.num_rows, -1), dtype=np.float32),
            last_steps=table["last_step"].to_numpy(),
        )

    def class_means(self) -> PublishedRows:
        """One row per class, in the order of first appearance: the mean, with slot -1."""
        uids, first, class_of_row = np.unique(
            self.uids.astype(str), return_index=True, return_inverse=True
        )
        means = np.zeros((len(uids), self.vectors.shape[1]), dtype=np.float32)
        np.add.at(means, class_of_row, self.vectors)
        means /= np.bincount(class_of_row)[:, None]
        order = np.argsort(first)
        last = np.full(len(uids), -1, dtype=np.int64)
        np.maximum.at(last, class_of_row, self.last_steps)
        slots = np.full(len(uids), -1, dtype=np.int32)
        return PublishedRows(uids[order].astype(object), slots, means[order], last[order])

    def of_class(self, uid: str) -> NDArray[np.float32]:
        """The rows of one class [n, D]; ValueError if the bank has none."""
        chosen = self.vectors[self.uids == uid]
        if len(chosen) == 0:
            raise ValueError(f"the bank has no rows of class {uid!r}: it is cold, or not a class")
        return chosen


class RowSearch:
    """An exact inner-product index over unit-length copies of the rows."""

    def __init__(self, rows: PublishedRows) -> None:
        import faiss

        self.rows = rows
        self._index = faiss.IndexFlatIP(rows.vectors.shape[1])
        self._index.add(_unit(rows.vectors))

    def nearest(self, queries: NDArray[np.float32], num_neighbours: int) -> list[list[Neighbour]]:
        """queries [Q, D], of any length -> per query its neighbours, the nearest first.

        ValueError if D is not the bank's, or num_neighbours is not positive.
        """
        dim = self.rows.vectors.shape[1]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries {queries.shape} for a bank of {dim} channels")
        if num_neighbours < 1:
            raise ValueError(f"num_neighbours is {num_neighbours}; it must be 1 or more")
        count = min(num_neighbours, len(self.rows.uids))
        cosines, found = self._index.search(_unit(queries), count)
        return [
            [
                Neighbour(str(self.rows.uids[row]), int(self.rows.slots[row]), float(cosine))
                for row, cosine in zip(line, values, strict=True)
            ]
            for line, values in zip(found, cosines, strict=True)
        ]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)
