"""The order of samples, a pure function of (shard sizes, seed, epoch): nothing is ever stored.

A blocked shuffle: the shards are permuted, then G shards at a time are shuffled together. An
epoch's order is cut into one contiguous segment per slot, so a slot touches only its own shards,
and a slot walks its segment of epoch 0, then its segment of epoch 1, and so on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memseg_dist.batch import IGNORE, derive_seed

if TYPE_CHECKING:
    from memseg_dist.data.index import Index

Rows = NDArray[np.int64]
Pair = tuple[Rows, Rows]

_CACHED_ROWS = 1 << 21  # 32 MiB of groups, if all are alike (more, if the slots' own are larger)


class Draw(NamedTuple):
    """A sample to read. copy: how many times this epoch's order has it already (see repeats)."""

    row: int
    epoch: int
    copy: int


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64, elementwise: the same on every machine and in every version of numpy."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def permutation(size: int, seed: int) -> Rows:
    """A permutation of 0 .. size - 1."""
    start = scramble(np.array([seed], dtype=np.uint64))
    keys = scramble(np.arange(size, dtype=np.uint64) ^ start)
    return np.argsort(keys, kind="stable").astype(np.int64)


class BlockedOrder:
    """The order of one source's samples.

    shard_sizes: samples per shard; rows are counted shard by shard. group: how many shards are
    shuffled together. repeats: how often each row comes in an epoch (once, if None). own_slots: how
    many slots are walked side by side, so that the group of each is kept.
    """

    def __init__(
        self,
        shard_sizes: NDArray[np.int64],
        seed: int,
        group: int = 16,
        repeats: NDArray[np.integer] | None = None,
        own_slots: int = 1,
    ) -> None:
        self.seed = seed
        self.group = group
        self.repeats = repeats
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
        if group < 1 or len(shard_sizes) == 0 or self._starts[-1] == 0:
            raise ValueError(
                f"nothing to order: {len(shard_sizes)} shards with {self._starts[-1]} samples in "
                f"groups of {group}"
            )
        self._weights = np.asarray(shard_sizes, dtype=np.int64)
        if repeats is not None:
            if len(repeats) != self._starts[-1] or repeats.min() < 1:
                raise ValueError(
                    f"repeats must be {self._starts[-1]} numbers of at least 1, one per sample; "
                    f"got {len(repeats)}, the smallest {repeats.min()}"
                )
            pairs = zip(self._starts[:-1], self._starts[1:], strict=True)
            self._weights = np.array([repeats[a:b].sum(dtype=np.int64) for a, b in pairs])
        self._length = int(self._weights.sum())
        per_group = max(1, self._length * group // len(shard_sizes))
        self._epoch = lru_cache(8)(self._order_of_groups)
        self._group = lru_cache(max(own_slots + 1, _CACHED_ROWS // per_group))(self._group_rows)

    def __len__(self) -> int:
        """Positions in an epoch."""
        return self._length

    def position(self, epoch: int, position: int) -> Draw:
        """The sample at a position of an epoch's order."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        ends = self._epoch(epoch)[1]
        number = int(np.searchsorted(ends, position, side="right"))
        place = position - (int(ends[number - 1]) if number else 0)
        rows, copies = self._group(epoch, number)
        return Draw(int(rows[place]), epoch, int(copies[place]))

    def slot_samples(self, step: int, slot: int, num_slots: int, batch: int) -> list[Draw]:
        """The `batch` samples that slot `slot` of this source's `num_slots` sees at a step."""
        first = slot * len(self) // num_slots
        length = (slot + 1) * len(self) // num_slots - first
        assert length > 0, "the loader refuses more slots than samples"
        walked = range(step * batch, (step + 1) * batch)
        return [self.position(at // length, first + at % length) for at in walked]

    def _order_of_groups(self, epoch: int) -> Pair:
        """(shards in this epoch's order, the position at which each group ends)."""
        shards = permutation(len(self._weights), derive_seed(self.seed, "shards", epoch))
        ends = np.cumsum(self._weights[shards])
        last = np.arange(self.group, len(shards) + self.group, self.group)
        return shards, ends[np.minimum(last, len(shards)) - 1]

    def _group_rows(self, epoch: int, number: int) -> Pair:
        """(rows, copies) of a group of shards, in this epoch's order."""
        members = self._epoch(epoch)[0][number * self.group : (number + 1) * self.group]
        rows = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in members])
        copies = np.zeros(len(rows), dtype=np.int64)
        if self.repeats is not None:
            times = self.repeats[rows].astype(np.int64)
            rows = np.repeat(rows, times)
            copies = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
        chosen = permutation(len(rows), derive_seed(self.seed, "group", epoch, number))
        return rows[chosen], copies[chosen]


def repeat_factors(index: Index, ids: NDArray[np.integer], threshold: float) -> NDArray[np.uint16]:
    """uint16 [rows]: how often each sample comes per epoch so that rare classes are seen more.

    As in LVIS: a class in a share f of the images has the factor max(1, sqrt(threshold / f)); an
    image has its rarest class's. The fraction is rounded up for that share of the rows which a hash
    of the row picks, so the numbers depend on nothing else. ids: local label -> class, or IGNORE
    for labels that balance nothing.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"repeat_threshold is {threshold}; it is a share of the images, 0 .. 1")
    counts = index.class_image_counts(int(ids.max(initial=0)) + 1, ids)
    share = np.maximum(counts, 1) / len(index)
    of_class = np.maximum(1.0, np.sqrt(threshold / share))
    of_label = np.where(ids == IGNORE, 1.0, of_class[ids])
    repeats = np.ones(len(index), dtype=np.uint16)
    for first in range(0, len(index), 1 << 18):
        last = min(first + (1 << 18), len(index))
        offsets = index.labels_offsets[first : last + 1]
        factors = of_label[index.labels_values[offsets[0] : offsets[-1]]]
        labelled = np.flatnonzero(np.diff(offsets) > 0)
        if len(labelled) == 0:
            continue
        wanted = np.maximum.reduceat(factors, offsets[:-1][labelled] - offsets[0])
        chance = scramble(np.arange(first, last, dtype=np.uint64)[labelled]) / 2.0**64
        whole = np.floor(wanted)
        repeats[first + labelled] = np.minimum(whole + (chance < wanted - whole), 65535)
    return repeats
