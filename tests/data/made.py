"""Small generated data sets for the data tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.tools.shards import Sample, finish, write_shard

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_CLASSES = 6
VOCABULARY = Vocabulary(tuple(Category(f"n{i}", f"class {i}") for i in range(NUM_CLASSES)))


SPACE = LabelSpace.union({"masks": VOCABULARY, "labels": VOCABULARY})


def encoded(seed: int, width: int = 40, height: int = 30, image_format: str = "JPEG") -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(buffer, image_format)
    return buffer.getvalue()


def blocks(seed: int, width: int = 40, height: int = 30) -> np.ndarray:
    """A mask of a few rectangles of random classes, some unknown."""
    ids = np.random.default_rng(seed).integers(0, NUM_CLASSES + 1, (3, 4)).astype(np.uint16)
    ids[ids == NUM_CLASSES] = 65535
    return np.kron(ids, np.ones((height // 3, width // 4), np.uint16))


def sample(number: int, with_mask: bool = True) -> Sample:
    mask = blocks(number) if with_mask else None
    return Sample(f"image{number:04d}", encoded(number), "jpg", (number % NUM_CLASSES,), mask)


def write(root: Path, sizes: tuple[int, ...], with_masks: bool = True) -> Index:
    """A data set of len(sizes) shards with that many samples each."""
    number = 0
    for shard, size in enumerate(sizes):
        samples = [sample(number + i, with_masks) for i in range(size)]
        write_shard(root, shard, samples, num_classes=NUM_CLASSES)
        number += size
    return finish(root, VOCABULARY)
