"""Which rows a memory has, which rank owns them, and which row a proposal goes to.

    Rings(num_classes, capacity)     a ring of M rows per class, written in turn
    OnePerClass(num_classes)         a ring of one row
    Regions.of_pairs(...)            a row per (class, image)

Rows are sorted by class, so the rows of a range of classes lie together; a class has one owner.

Shape letters: T rows, C classes, E events (proposed rows), I id columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memseg_dist.batch import derive_seed
from memseg_dist.memory.state import Reader

TableKind = Literal["local", "sharded"]
"""local: every rank holds every row (the reference); sharded: each row lies on one rank."""

NO_ROW = -1


def image_id(key: str) -> int:
    """The number (63 bits) by which memories know the image `key`: the same on every machine."""
    return derive_seed("image", key)


class Layout:
    """The rows of a memory. `keys` names each row: its "class" [T], ascending, and one column more.

    num_ids: how many ids a proposal gives for each event; the first is its class.
    """

    num_ids = 1

    def __init__(self, num_classes: int, keys: Mapping[str, np.ndarray]) -> None:
        self.num_classes, self.keys = num_classes, dict(keys)
        self.classes = self.keys["class"]
        self.starts = np.searchsorted(self.classes, np.arange(num_classes + 1))
        """int64 [C + 1]: class c has the rows [starts[c], starts[c + 1])."""
        self.counts = np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.classes)

    def bounds(self, num_ranks: int) -> list[int]:
        """Rank r owns the classes [bounds[r], bounds[r + 1]), which may be none: numbers of rows as
        equal as whole classes allow.
        """
        # A class belongs to the rank in whose share of the rows its middle lies.
        middles = self.starts[:-1] + self.starts[1:]
        cuts = [2 * len(self) * rank / num_ranks for rank in range(1, num_ranks)]
        return [0, *np.searchsorted(middles, cuts).tolist(), self.num_classes]

    def find(self, ids_EI: np.ndarray) -> np.ndarray:
        """int64 [E]: the row of each event, or the first row that it may go to; NO_ROW: none."""
        raise NotImplementedError

    def target(self, first_E: Tensor, is_written_E: Tensor, updates: Tensor) -> Tensor:
        """int64 [E]: the row that each event goes to, of those that `find` has found.

        updates: how often each row has been written before this step. No host sync.
        """
        return first_E

    def check_saved(self, read: Reader) -> None:
        """ValueError unless a saved memory has the same rows."""
        saved = {name: read(name).numpy() for name in self.keys}
        if all(np.array_equal(saved[name], key) for name, key in self.keys.items()):
            return
        before, now = (Counter(k["class"].ravel().tolist()) for k in (saved, self.keys))
        changed = sorted(key for key in before | now if before[key] != now[key])
        raise ValueError(
            f"the saved memory has {_described(saved)}, this run has {_described(self.keys)}; "
            f"classes with another number of rows: {changed[:8]}: the classes, the images "
            "or labels of a source, or the capacity have changed; restore them, or give the run "
            "another name"
        )


class Rings(Layout):
    """`capacity` rows for each class (of `class_ids`, ascending, if given), written in turn.

    The next position of a class is the number of its writes modulo the capacity, so a ring needs no
    pointer, and whether an event is written may be known to the device alone.
    """

    def __init__(
        self, num_classes: int, capacity: int, class_ids: np.ndarray | None = None
    ) -> None:
        if min(num_classes, capacity) < 1:
            raise ValueError(
                f"num_classes is {num_classes} and capacity {capacity}: give at least 1 of each"
            )
        ids = np.arange(num_classes) if class_ids is None else np.asarray(class_ids, np.int64)
        position = np.tile(np.arange(capacity), len(ids))
        super().__init__(num_classes, {"class": np.repeat(ids, capacity), "position": position})
        self.capacity = capacity

    def find(self, ids_EI: np.ndarray) -> np.ndarray:
        class_E = ids_EI[:, 0]
        return np.where(self.counts[class_E] > 0, self.starts[class_E], NO_ROW)

    def target(self, first_E: Tensor, is_written_E: Tensor, updates: Tensor) -> Tensor:
        same_EE = (first_E[:, None] == first_E) & is_written_E
        earlier_E = same_EE.tril(-1).sum(dim=1)
        position_M = torch.arange(self.capacity, device=first_E.device)
        writes_E = updates[first_E[:, None] + position_M].sum(dim=1)
        return first_E + (writes_E + earlier_E) % self.capacity


class OnePerClass(Rings):
    """One row for each class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, 1)


class Regions(Layout):
    """A row for each (class, image); a proposal gives both ids for each event.

    classes: int64 [T], ascending; images: int64 [T], the ids of `image_id`, ascending within a
    class. Make one with `of_pairs`.
    """

    num_ids = 2

    def __init__(self, num_classes: int, classes: np.ndarray, images: np.ndarray) -> None:
        super().__init__(num_classes, {"class": classes, "image": images})
        self.images = images

    @classmethod
    def of_pairs(cls, classes: np.ndarray, images: np.ndarray, num_classes: int) -> Regions:
        """ValueError for a repeated pair or a class out of range."""
        classes, images = np.asarray(classes, np.int64), np.asarray(images, np.int64)
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(
                f"classes {classes.min()} .. {classes.max()}: class ids must lie in "
                f"0 .. {num_classes - 1}"
            )
        order = np.lexsort((images, classes))
        classes, images = classes[order], images[order]
        twice = np.flatnonzero((np.diff(classes) == 0) & (np.diff(images) == 0))
        if len(twice):
            raise ValueError(
                f"image id {images[twice[0]]} is listed twice for class {classes[twice[0]]}: two "
                "images of the sources have one key; give them different keys"
            )
        return cls(num_classes, classes, images)

    def cut(self, capacity: int | None, seed: int = 0) -> Regions:
        """At most `capacity` images of each class; all of them for None.

        Which ones is decided by a seeded hash of the image id alone: by no order, no rank and no
        earlier run.
        """
        if capacity is None:
            return self
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a class keeps at least 1 image, or None")
        order = np.lexsort((_scattered(self.images, seed), self.classes))
        nth = np.arange(len(order)) - self.starts[self.classes[order]]
        kept = np.sort(order[nth < capacity])
        return Regions(self.num_classes, self.classes[kept], self.images[kept])

    def find(self, ids_EI: np.ndarray) -> np.ndarray:
        """All pairs are bisected at once."""
        if len(self) == 0:
            return np.full(len(ids_EI), NO_ROW, dtype=np.int64)
        class_E, image_E = ids_EI.T
        low, high = self.starts[class_E], self.starts[class_E + 1]
        end = high
        for _ in range(int(self.counts.max()).bit_length()):
            middle = (low + high) // 2
            is_below = (low < high) & (self.images[np.minimum(middle, len(self) - 1)] < image_E)
            low, high = np.where(is_below, middle + 1, low), np.where(is_below, high, middle)
        row = np.minimum(low, len(self) - 1)
        return np.where((low < end) & (self.images[row] == image_E), row, NO_ROW)


def _described(keys: Mapping[str, np.ndarray]) -> str:
    distinct = (f"{len(np.unique(key))} {name} ids" for name, key in keys.items())
    return f"{len(keys['class'])} rows ({', '.join(distinct)})"


def _scattered(images: np.ndarray, seed: int) -> np.ndarray:
    """uint64: every id mixed with the seed (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = images.astype(np.uint64) + np.uint64(derive_seed(seed, "capacity"))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
