"""Nearest neighbours in a published bank, by cosine, with FAISS.

    rows = PublishedRows.open("runs/bank")              # what `ShardedRows.publish` wrote
    rows.nearest(queries, num_neighbours=10)            # per query a list of Neighbour

Shape letters: R published rows, C classes with rows, D channels, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from memseg_dist.data.columns import read_table, reading_parquet

COLUMNS = ("uid", "position", "vector", "count", "last_step")


@dataclass(frozen=True)
class Neighbour:
    """A row (or, with position -1, the mean of a class's rows) and its cosine to the query."""

    uid: str
    position: int
    cosine: float


@dataclass(frozen=True)
class PublishedRows:
    """The rows of a bank [R]: of each its uid, position in the class, vector [D] and last step."""

    uids: NDArray[np.object_]
    positions: NDArray[np.int32]
    vectors: NDArray[np.float32]
    last_steps: NDArray[np.int64]

    @classmethod
    def open(cls, path: str | Path) -> PublishedRows:
        """Read one Parquet file, or all of a directory. ValueError if it holds no bank."""
        path = Path(path)
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ValueError(
                f"no published bank at {path}: expected *.parquet of ShardedRows.publish"
            )
        for file in files:
            with reading_parquet(file):
                missing = sorted(set(COLUMNS) - set(pq.read_schema(file).names))
            if missing:
                raise ValueError(f"{file} is no published bank: it lacks the columns {missing}")
        table = pa.concat_tables([read_table(file, [*COLUMNS]) for file in files]).combine_chunks()
        if table.num_rows == 0:
            raise ValueError(f"the bank at {path} has no rows: nothing was committed to it yet")
        vectors = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return cls(
            uids=table["uid"].to_numpy(),
            positions=table["position"].to_numpy(),
            vectors=np.ascontiguousarray(vectors.reshape(table.num_rows, -1), dtype=np.float32),
            last_steps=table["last_step"].to_numpy(),
        )

    def class_means(self) -> PublishedRows:
        """One row per class, by uid: the mean, with position -1."""
        uids, of_row = np.unique(self.uids.astype(str), return_inverse=True)
        means = np.zeros((len(uids), self.vectors.shape[1]), dtype=np.float32)
        np.add.at(means, of_row, self.vectors)
        last = np.full(len(uids), -1, dtype=np.int64)
        np.maximum.at(last, of_row, self.last_steps)
        positions = np.full(len(uids), -1, dtype=np.int32)
        means /= np.bincount(of_row)[:, None]
        return PublishedRows(uids.astype(object), positions, means, last)

    def of_class(self, uid: str) -> NDArray[np.float32]:
        """The rows of one class [n, D]; ValueError if the bank has none."""
        chosen = self.vectors[self.uids == uid]
        if len(chosen) == 0:
            raise ValueError(f"the bank has no rows of class {uid!r}: it is cold, or not a class")
        return chosen

    def nearest(self, queries: NDArray[np.float32], num_neighbours: int) -> list[list[Neighbour]]:
        """queries [Q, D], of any length -> per query its neighbours, the nearest first.

        ValueError if D is not the bank's, or num_neighbours is not positive.
        """
        import faiss

        dim = self.vectors.shape[1]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries {queries.shape} for a bank of {dim} channels")
        if num_neighbours < 1:
            raise ValueError(f"num_neighbours is {num_neighbours}; it must be 1 or more")
        index = faiss.IndexFlatIP(dim)
        index.add(_unit(self.vectors))
        cosines, found = index.search(_unit(queries), min(num_neighbours, len(self.uids)))
        return [
            [
                Neighbour(str(self.uids[row]), int(self.positions[row]), float(cosine))
                for row, cosine in zip(line, values, strict=True)
            ]
            for line, values in zip(found, cosines, strict=True)
        ]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)
