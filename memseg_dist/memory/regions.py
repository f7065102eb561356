"""Which (class, image) pairs have a row in a memory, and at which row a pair is found.

Shape letters: T rows (pairs), C classes, E pairs that are looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memseg_dist.batch import derive_seed

NO_ROW = -1


def image_id(key: str) -> int:
    """The number (63 bits) by which memories know the image `key`: the same on every machine."""
    return derive_seed("image", key)


@dataclass(frozen=True)
class Regions:
    """The pairs, one row each: `classes` int64 [T] ascending; `images` int64 [T], ascending within
    a class. Make one with `of_pairs` or `of_rings`.
    """

    num_classes: int
    classes: np.ndarray
    images: np.ndarray

    @classmethod
    def of_pairs(cls, classes: np.ndarray, images: np.ndarray, num_classes: int) -> Regions:
        """A row per pair. ValueError for a repeated pair or a class out of range."""
        classes, images = np.asarray(classes, np.int64), np.asarray(images, np.int64)
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(f"classes {classes.min()} .. {classes.max()} of {num_classes}")
        order = np.lexsort((images, classes))
        classes, images = classes[order], images[order]
        twice = np.flatnonzero((np.diff(classes) == 0) & (np.diff(images) == 0))
        if len(twice):
            raise ValueError(
                f"image id {images[twice[0]]} is listed twice for class {classes[twice[0]]}: two "
                "images of the sources have one key; give them different keys"
            )
        return cls(num_classes, classes, images)

    @classmethod
    def of_rings(cls, class_ids: np.ndarray, capacity: int, num_classes: int) -> Regions:
        """`capacity` rows for each of `class_ids` (ascending) that belong to no image; `images`
        holds their positions.
        """
        positions = np.tile(np.arange(capacity, dtype=np.int64), len(class_ids))
        return cls(num_classes, np.repeat(np.asarray(class_ids, np.int64), capacity), positions)

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

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [C + 1]: class c has the rows [starts[c], starts[c + 1])."""
        return np.searchsorted(self.classes, np.arange(self.num_classes + 1))

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [C]: rows of each class."""
        return np.diff(self.starts)

    def find(self, classes_E: np.ndarray, images_E: np.ndarray) -> np.ndarray:
        """int64 [E]: the row of each pair, NO_ROW where there is none. All bisected at once."""
        if len(self) == 0:
            return np.full(len(classes_E), NO_ROW, dtype=np.int64)
        low, high = self.starts[classes_E], self.starts[classes_E + 1]
        end = high
        for _ in range(int(self.counts.max()).bit_length()):
            middle = (low + high) // 2
            is_below = (low < high) & (self.images[np.minimum(middle, len(self) - 1)] < images_E)
            low, high = np.where(is_below, middle + 1, low), np.where(is_below, high, middle)
        row = np.minimum(low, len(self) - 1)
        return np.where((low < end) & (self.images[row] == images_E), row, NO_ROW)


def _scattered(images: np.ndarray, seed: int) -> np.ndarray:
    """uint64: every id mixed with the seed (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = images.astype(np.uint64) + np.uint64(derive_seed(seed, "capacity"))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
