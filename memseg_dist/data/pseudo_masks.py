"""Pseudo masks of a source's images, in shards of their own: the same keys, another vocabulary.

The label stage writes such shards. They belong to no one but a source that names them, so a
labelled source can have its own masks and the pseudo masks of the same pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.data.cache import ShardCache
from memseg_dist.data.index import Index, some
from memseg_dist.data.reader import Reader
from memseg_dist.data.vocabulary import LabelSpace, Vocabulary


class PseudoMasks:
    """The pseudo masks in `path`, a folder or URL of shards, of the samples of `index`.

    exclude: label-space uids whose pixels become IGNORE. where: the source, for messages.
    ValueError for samples without a pseudo mask, for one of another size than its image, and for
    classes that the label space does not have.
    """

    def __init__(
        self,
        path: str,
        index: Index,
        label_space: LabelSpace,
        exclude: tuple[str, ...],
        cache_dir: Path,
        shards: ShardCache,
        where: str,
    ) -> None:
        where = f"{where}, pseudo_masks {path}"
        self.index = masks = Index.open(path, cache_dir)
        ids = ids_by_uid(masks.vocabulary, label_space, where)
        excluded = [label_space.vocabulary.index(uid) for uid in exclude]
        ids[np.isin(ids, excluded)] = IGNORE
        self._rows = _rows_of_samples(index, masks, where)
        masks.check_shards()
        self._reader = Reader(masks, shards, ids)

    def read(self, row: int) -> Tensor:
        """int32 [H, W] in label-space ids, of the sample at this row of the source's index."""
        return self._reader.read_mask(int(self._rows[row])).int()


def ids_by_uid(vocabulary: Vocabulary, label_space: LabelSpace, where: str) -> NDArray[np.int32]:
    """Local id -> label-space id; ValueError for a uid that the label space does not have."""
    unknown = [uid for uid in vocabulary.uids if uid not in label_space.vocabulary]
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of its {len(vocabulary)} classes are none of this run: "
            f"{some(unknown)}; name shards that were labelled with classes of the run's sources"
        )
    ids = [label_space.vocabulary.index(uid) for uid in vocabulary.uids]
    return np.array(ids, dtype=np.int32)


def _rows_of_samples(index: Index, masks: Index, where: str) -> NDArray[np.int64]:
    """Per row of `index` the row of `masks` with the same key, all of them with a fitting mask."""
    keys = [*index.all_keys()]
    rows = masks.rows_of(keys)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise ValueError(
            f"{where}: {len(missing)} of the source's {len(keys)} samples are not there: "
            f"{some([keys[row] for row in missing])}; the label stage leaves out images that it "
            "cannot read, also where on_corrupt is 'skip': label the whole data set, or give the "
            "source a split without these"
        )
    empty = np.flatnonzero(masks.numbers("mask_size")[rows] == 0)
    if len(empty):
        raise ValueError(
            f"{where}: {len(empty)} of the source's {len(keys)} samples have no mask there: "
            f"{some([keys[row] for row in empty])}; name shards that the label stage wrote"
        )
    sizes, wanted = (
        np.stack([each.numbers("width"), each.numbers("height")], axis=1) for each in (masks, index)
    )
    other = np.flatnonzero((sizes[rows] != wanted).any(axis=1))
    if len(other):
        first = other[0]
        raise ValueError(
            f"{where}: {len(other)} masks have another size than their images, as {keys[first]!r}: "
            f"{sizes[rows[first]].tolist()} instead of {wanted[first].tolist()} (width, height); "
            "label the images of the source's own shards"
        )
    return rows
