"""Rows of a bank as Parquet, for inspection and search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memseg_dist import dist


def publish_rows(
    directory: str | Path,
    uids: Sequence[str],
    *,
    num_classes: int,
    class_ids: np.ndarray,
    slots: np.ndarray,
    vectors: np.ndarray,
    last_steps: np.ndarray,
) -> None:
    """Write this rank's rows [n] as one file of `directory`.

    Columns: uid, slot (position within the class), vector, count (rows of the class), last_step.
    Errors: ValueError for another number of uids than classes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if len(uids) != num_classes:
        raise ValueError(f"{len(uids)} uids for a bank of {num_classes} classes")
    counts = np.bincount(class_ids, minlength=num_classes)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    columns = {
        "uid": pa.array(np.asarray(uids, dtype=object)[class_ids], pa.string()),
        "slot": pa.array(slots.astype(np.int32)),
        "vector": vector,
        "count": pa.array(counts[class_ids]),
        "last_step": pa.array(last_steps.astype(np.int64)),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"bank-{dist.rank():05d}-of-{dist.size():05d}.parquet"
    pq.write_table(pa.table(columns), folder / name)
