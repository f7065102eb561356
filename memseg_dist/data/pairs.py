"""Which image shows which class, over whole sources, from their indexes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memseg_dist.batch import IGNORE
from memseg_dist.data.index import Index
from memseg_dist.data.source import Source
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.memory.regions import Regions, image_id


def labelled_regions(
    sources: Sequence[Source], label_space: LabelSpace, cache_dir: str | Path
) -> Regions:
    """Every (label-space id, image) pair of the sources, without the classes they exclude.

    About 2 s per million images. ValueError for an image key that occurs twice.
    """
    classes, images = [], []
    for source in sources:
        index = Index.open(source.path, cache_dir)
        to_union = label_space.ids(source.name)
        excluded = [label_space.vocabulary.index(uid) for uid in source.exclude]
        to_union = np.where(np.isin(to_union, excluded), IGNORE, to_union)
        of_image = np.diff(index.labels_offsets)
        ids = [image_id(index.key(row)) if of_image[row] else 0 for row in range(len(index))]
        label = to_union[index.labels_values].astype(np.int64)
        image = np.repeat(np.array(ids, dtype=np.int64), of_image)
        pairs = np.stack([label, image], axis=1)[label != IGNORE]
        pairs = np.unique(pairs, axis=0)  # several names of a source may be one class
        classes.append(pairs[:, 0])
        images.append(pairs[:, 1])
    return Regions.of_pairs(np.concatenate(classes), np.concatenate(images), len(label_space))


def steps_per_epoch(sources: Sequence[Source], cache_dir: str | Path) -> int:
    """Steps in which every image of every source is seen at least once."""
    return max(
        -(-len(Index.open(source.path, cache_dir)) // (source.slots * source.batch_per_slot))
        for source in sources
    )
