"""One row of an index to decoded tensors in label-space ids.

Files are opened on first use in each process and read at the index's offsets; a pickled reader
carries no handle.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.data.cache import ShardCache
from memseg_dist.data.decode import CorruptSample, decode_image, decode_mask
from memseg_dist.data.files import join
from memseg_dist.data.index import Index, Row

_OPEN_SHARDS = 64


class Decoded(NamedTuple):
    """image uint8 [3, H, W]; mask int32 [H, W] in label-space ids or None; labels ascending."""

    image: Tensor
    mask: Tensor | None
    labels: tuple[int, ...]


class Reader:
    """Reads samples of one index. `to_union`: local id -> label-space id, IGNORE = left out."""

    def __init__(self, index: Index, cache: ShardCache, to_union: NDArray[np.int32]) -> None:
        self.index = index
        self._cache = cache
        self._to_union = to_union
        # Local id -1 (unknown) indexes the last entry.
        self._lookup = np.append(to_union, np.int32(IGNORE)).astype(np.int32)
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, number: int, with_mask: bool) -> Decoded:
        """CorruptSample, naming shard, key and offset, if a member cannot be decoded."""
        row = self.index.row(number)
        image = self._decode(row, row.image_offset, row.image_size, row.image_format)
        mask = self._mask(row) if with_mask and row.mask_size else None
        return Decoded(image, mask, self._labels(row))

    def read_mask(self, number: int) -> Tensor:
        """int64 [H, W] of a sample that has a mask."""
        return self._mask(self.index.row(number)).long()

    def image_bytes(self, number: int) -> bytes:
        """The image's file as it is stored."""
        row = self.index.row(number)
        return os.pread(self._shard(row.shard).fileno(), row.image_size, row.image_offset)

    def _mask(self, row: Row) -> Tensor:
        mask = self._decode(row, row.mask_offset, row.mask_size, "mask")
        highest = int(mask.max())
        if highest >= len(self._to_union):
            where = self._where(row, row.mask_offset)
            raise CorruptSample(_outside(where, "mask value", highest, len(self._to_union)))
        return torch.from_numpy(self._lookup.take(mask.numpy()))  # -1 is the last entry

    def _labels(self, row: Row) -> tuple[int, ...]:
        if row.labels and not 0 <= row.labels[0] <= row.labels[-1] < len(self._to_union):
            where = self._where(row, row.image_offset)
            raise CorruptSample(_outside(where, "labels", row.labels, len(self._to_union)))
        ids = {int(self._to_union[label]) for label in row.labels}
        return tuple(sorted(ids - {IGNORE}))

    def _decode(self, row: Row, offset: int, size: int, kind: str) -> Tensor:
        content = os.pread(self._shard(row.shard).fileno(), size, offset)
        if len(content) < size:
            raise CorruptSample(
                f"{self._where(row, offset)}: the shard is cut short, {len(content)} of {size} "
                "bytes are there; copy or write it again"
            )
        try:
            pixels = decode_mask(content) if kind == "mask" else decode_image(content, kind)
            height, width = pixels.shape[-2:]
            if (height, width) != (row.height, row.width):
                raise CorruptSample(
                    f"the {'mask' if kind == 'mask' else 'image'} is {width} x {height} pixels but "
                    f"the index says {row.width} x {row.height}"
                    + ("" if row.width else ": part of the sample could not be read when indexed")
                )
            return pixels
        except CorruptSample as error:
            raise CorruptSample(
                f"{self._where(row, offset)}: {error}; write the shard again without it, or set "
                "on_corrupt='skip'"
            ) from error

    def _where(self, row: Row, offset: int) -> str:
        shard = join(self.index.root, row.shard)
        return f"sample {row.key!r} of shard {shard} at byte {offset}"

    def _shard(self, name: str) -> IO[bytes]:
        if name not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[name] = self._cache.open(join(self.index.root, name))
        self._open.move_to_end(name)
        return self._open[name]


def _outside(where: str, what: str, value: object, num_classes: int) -> str:
    return (
        f"{where}: {what} {value} outside the vocabulary of {num_classes} classes; write the data "
        "set with the vocabulary that its labels count in"
    )
