"""A data set's index, memory-mapped: what a row costs is disk, not RAM.

`index.parquet` is copied once, batch by batch of rows, into files in the cache folder, and so are
the rows of each split. Every process maps the same files, so 14 million rows cost a process what it
touches. A copy stays in the cache when its data set is written anew; it may be deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memseg_dist.batch import IGNORE, derive_seed
from memseg_dist.data import files
from memseg_dist.data.columns import FACTS_NAME, LAYOUT, ROWS_NAME, Facts, convert
from memseg_dist.data.schema import INDEX_NAME, VOCABULARY_NAME
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.jsonable import shown


class Row(NamedTuple):
    """One sample: where its members lie (mask_size 0 = no mask) and its local labels."""

    key: str
    shard: str
    image_offset: int
    image_size: int
    image_format: str
    mask_offset: int
    mask_size: int
    width: int
    height: int
    labels: tuple[int, ...]


class Index:
    """The rows of a data set, sorted by shard. `Index.open` makes one, `only` one of some of them.

    shard_names: paths relative to `root`, or whole paths where the index lies elsewhere.
    shard_sizes: int64, samples per shard. shard_starts: int64 [num_shards + 1], the first row of
    each shard, then the number of rows. num_masks: how many samples have a mask. num_unreadable:
    how many could not be read when others' shards were indexed; they have 0 x 0 pixels. max_label:
    the highest local label, -1 if no sample has one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts = facts = Facts(**json.loads((folder / FACTS_NAME).read_text()))
        self.root, self.num_masks, self.max_label = facts.root, facts.num_masks, facts.max_label
        self.num_unreadable = facts.num_unreadable
        self.shard_names = [*facts.shard_sizes]
        self.shard_sizes = np.array([*facts.shard_sizes.values()], dtype=np.int64)
        self.shard_starts = np.append(np.int64(0), np.cumsum(self.shard_sizes))

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self._folder,)  # another process maps the files again

    @classmethod
    def open(cls, root: str | Path, cache_dir: str | Path | None = None) -> Index:
        """The index of `root`, a local folder or an fsspec URL: its index.parquet, or for a root
        that cannot be written to the one that `tools.external` made in the cache.

        ValueError if there is neither, or for a URL with a secret.
        """
        root_text = files.data_root(root)
        local = files.local_path(root_text)
        cache = files.make_folder(Path(cache_dir or files.default_cache()) / "index")
        index_path = files.join(root_text, INDEX_NAME)
        if not files.exists(index_path):
            index_path = str(external_index_folder(root_text, cache) / INDEX_NAME)
            if not files.exists(index_path):
                raise _no_index(root_text, local)
        folder = cache / f"{derive_seed(index_path, *files.fingerprint(index_path), LAYOUT):016x}"
        return _open_or_convert(folder, index_path, root_text)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def __str__(self) -> str:
        text = f"{len(self.shard_names)} shards, {len(self)} samples, {self.num_masks} masks"
        return text + (f", {self.num_unreadable} unreadable" if self.num_unreadable else "")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self._facts.vocabulary)

    @property
    def parquet(self) -> str:
        """The path or URL of the Parquet index that this one was made from."""
        return self._facts.vocabulary.removesuffix(VOCABULARY_NAME) + INDEX_NAME

    @cached_property
    def _rows(self) -> pa.Table:
        with pa.memory_map(str(self._folder / ROWS_NAME)) as source:
            return pa.ipc.open_file(source).read_all()

    @cached_property
    def labels_offsets(self) -> NDArray[np.int64]:
        """[rows + 1]: row i's labels are labels_values[labels_offsets[i]:labels_offsets[i + 1]]."""
        return self._map("labels_offsets", np.int64, len(self) + 1)

    @cached_property
    def labels_values(self) -> NDArray[np.int32]:
        return self._map("labels_values", np.int32, self._facts.num_labels)

    def _map(self, name: str, dtype: Any, size: int) -> NDArray[Any]:
        if size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=dtype)
        return np.memmap(self._folder / name, dtype=dtype, mode="r", shape=(size,)).view(np.ndarray)

    def row(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.root}: row {number} of {len(self)}")
        return Row(**self._rows.slice(number, 1).to_pylist()[0], labels=self.labels(number))

    def key(self, number: int) -> str:
        return self._rows["key"][number].as_py()

    def all_keys(self) -> Iterator[str]:
        """Of all rows, many times faster than one by one."""
        for chunk in self._rows["key"].chunks:
            yield from chunk.to_pylist()

    def numbers(self, column: str) -> NDArray[Any]:
        """[rows]: a column of numbers, as "mask_size" or "width"."""
        return self._rows[column].to_numpy()

    def rows_of(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """The row of each key, -1 for a key that these shards lack."""
        asked = pa.array(keys, pa.string())
        unique = asked.unique()
        places = pc.index_in(self._rows["key"], value_set=unique).fill_null(-1).to_numpy()
        rows = np.full(len(unique), -1, dtype=np.int64)
        found = np.flatnonzero(places >= 0)
        rows[places[found]] = found
        return rows[pc.index_in(asked, value_set=unique).to_numpy()]

    def only(self, keys: Sequence[str]) -> Index:
        """The index as it would be if the shards held these samples alone, in the shards' order.

        It is made once, in the cache. ValueError for no keys, a key that is given twice, or keys
        that the shards lack.
        """
        if not keys:
            raise ValueError("it names no keys; write one key a line")
        folder = self._folder.parent / f"{derive_seed(self._folder.name, *sorted(keys)):016x}"
        if not folder.exists():
            self._check_keys(keys)
        return _open_or_convert(folder, self.parquet, self.root, keys)

    def _check_keys(self, keys: Sequence[str]) -> None:
        twice = sorted(key for key, count in Counter(keys).items() if count > 1)
        if twice:
            raise ValueError(
                f"{len(twice)} keys are given more than once: {some(twice)}; name each one once"
            )
        rows = self.rows_of(keys)
        missing = [key for key, row in zip(keys, rows.tolist(), strict=True) if row < 0]
        if missing:
            raise ValueError(
                f"{len(missing)} of its {len(keys)} keys are not in the shards at {self.root}: "
                f"{some(missing)}; take them out, or name the shards that the list was made for"
            )

    def labels(self, number: int) -> tuple[int, ...]:
        first, last = self.labels_offsets[number : number + 2]
        return tuple(self.labels_values[first:last].tolist())

    def class_image_counts(
        self, num_classes: int, ids: NDArray[np.integer] | None = None
    ) -> NDArray[np.int64]:
        """int64 [num_classes]: how many images carry a label of each class.

        ids: local label -> class, or IGNORE for what is not counted; by default the label itself.
        ValueError for a label that has no id.
        """
        ids = np.arange(num_classes) if ids is None else ids
        self.check_labels(len(ids))
        counts = np.zeros(num_classes, dtype=np.int64)
        for first in range(0, len(self), 1 << 18):
            offsets = self.labels_offsets[first : first + (1 << 18) + 1]
            class_of = ids[self.labels_values[offsets[0] : offsets[-1]]].astype(np.int64)
            image = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
            # several labels of an image may be one class; np.unique takes many times as long
            pairs = np.sort((image * num_classes + class_of)[class_of != IGNORE])
            pairs = pairs[np.diff(pairs, prepend=-1) > 0]
            counts += np.bincount(pairs % num_classes, minlength=num_classes)
        return counts

    def class_pixel_counts(self, num_classes: int) -> NDArray[np.int64]:
        """int64 [num_classes]: how many pixels of the masks show each local label."""
        shown = {int(label): pixels for label, pixels in self._facts.pixels.items()}
        return np.array([shown.get(label, 0) for label in range(num_classes)], dtype=np.int64)

    def fingerprint(self) -> str:
        """16 hex digits that follow from the sizes of all shards, images and masks and from the
        labels, wherever the shards lie.
        """
        sizes = (self.numbers(name) for name in ("image_size", "mask_size"))
        digest = hashlib.blake2b(digest_size=8)
        for values in (self.shard_sizes, *sizes, self.labels_offsets, self.labels_values):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def check_labels(self, num_classes: int) -> None:
        """ValueError if a label is none of `num_classes`."""
        if self.max_label >= num_classes:
            raise ValueError(
                f"{self.root}: label {self.max_label} is outside the vocabulary of {num_classes} "
                "classes; use the vocabulary.json that was written with the shards"
            )

    def check_shards(self) -> None:
        """ValueError if a local shard is missing or shorter than its index says."""
        for last in (self.shard_starts[1:] - 1).tolist():
            row = self.row(last)
            path = files.local_path(files.join(self.root, row.shard))
            if path is None:
                continue
            if not path.exists():
                raise ValueError(
                    f"shard {path} is missing although {self.parquet} lists it; restore it or "
                    "write the data set again"
                )
            end = max(row.image_offset + row.image_size, row.mask_offset + row.mask_size)
            if path.stat().st_size < end:
                raise ValueError(
                    f"shard {path} is cut short: {path.stat().st_size} bytes, but sample "
                    f"{row.key!r} ends at byte {end}; copy or write it again"
                )


def _open_or_convert(
    folder: Path, index_path: str, root: str, keys: Sequence[str] | None = None
) -> Index:
    """The index in `folder`, made by one process where it is not there yet."""
    if not folder.exists():
        with files.locked(folder.with_suffix(".lock")):
            if not folder.exists():
                convert(index_path, root, folder, keys)
    return Index(folder)


def some(keys: Sequence[str]) -> str:
    """A few of the keys, for a message."""
    return f"{', '.join(map(shown, keys[:3]))}{', ...' if len(keys) > 3 else ''}"


def external_index_folder(root: str, cache: Path) -> Path:
    """Where the index of the shards in `root` lies, if it cannot lie beside them."""
    return cache / f"external-{derive_seed(root):016x}"


def _no_index(root: str, local: Path | None) -> ValueError:
    if local is not None and not local.is_dir():
        return ValueError(f"no data set at {root}: there is no such folder; check the path")
    return ValueError(
        f"{root}: no {INDEX_NAME}; for shards that others made write it with `memseg data index "
        f"{root}`, else check the path"
    )
