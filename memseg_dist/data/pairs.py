"""Which image shows which class, over whole sources, from their indexes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memseg_dist.batch import IGNORE
from memseg_dist.data.index import Index
from memseg_dist.data.order import repeat_factors
from memseg_dist.data.source import Source, kept_ids, open_index
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.memory.layouts import Regions, image_id


def labelled_regions(
    sources: Sequence[Source], label_space: LabelSpace, cache_dir: str | Path
) -> Regions:
    """Every (label-space id, image) pair of the sources, without the classes they exclude; a source
    with supervision "none" has no pairs.

    About 2 s per million images. ValueError naming an image key that two samples have.
    """
    classes, images = [], []
    seen: list[np.ndarray] = []
    for source in _labelled(sources):
        index = open_index(source, cache_dir)
        of_image = np.diff(index.labels_offsets)
        ids = np.fromiter((image_id(key) for key in index.all_keys()), np.int64, len(index))
        _check_unique(ids[of_image > 0], index, source, seen)
        seen.append(ids[of_image > 0])
        label = kept_ids(source, label_space)[index.labels_values].astype(np.int64)
        image = np.repeat(ids, of_image)
        pairs = np.stack([label, image], axis=1)[label != IGNORE]
        pairs = np.unique(pairs, axis=0)  # several names of a source may be one class
        classes.append(pairs[:, 0])
        images.append(pairs[:, 1])
    return Regions.of_pairs(np.concatenate(classes), np.concatenate(images), len(label_space))


def _labelled(sources: Sequence[Source]) -> list[Source]:
    """Those whose labels may be looked at."""
    return [source for source in sources if source.supervision != "none"]


def _check_unique(
    ids: np.ndarray, index: Index, source: Source, before: Sequence[np.ndarray]
) -> None:
    """ValueError naming a key of `source` that it, or a source before it, has already."""
    unique, counts = np.unique(ids, return_counts=True)
    twice = np.concatenate(
        [unique[counts > 1], *(np.intersect1d(unique, earlier) for earlier in before)]
    )
    if len(twice) == 0:
        return
    key = next(key for key in index.all_keys() if image_id(key) == twice[0])
    raise ValueError(
        f"source {source.name!r} at {source.path}: the image key {key!r} occurs twice in the "
        "sources of this run; memories know images by their keys: give them different ones"
    )


def steps_per_epoch(
    sources: Sequence[Source], label_space: LabelSpace, cache_dir: str | Path
) -> int:
    """Steps of about an epoch of the longest source: its samples, those that `repeat_threshold`
    repeats as often as they come, over the samples of a step.
    """
    return max(
        -(-_epoch_length(source, label_space, cache_dir) // (source.slots * source.batch_per_slot))
        for source in sources
    )


def _epoch_length(source: Source, label_space: LabelSpace, cache_dir: str | Path) -> int:
    index, share = open_index(source, cache_dir), source.repeat_threshold
    if share is None:
        return len(index)
    repeats = repeat_factors(index, kept_ids(source, label_space), share)
    return int(repeats.sum(dtype=np.int64))


def image_counts(
    sources: Sequence[Source], label_space: LabelSpace, cache_dir: str | Path
) -> np.ndarray:
    """int64 [C]: how many images of the sources are labelled with each class, or show it in their
    masks, from the indexes. What a source excludes is counted too; a source with supervision "none"
    is not.
    """
    counts = np.zeros(len(label_space), dtype=np.int64)
    for source in _labelled(sources):
        ids = label_space.ids(source.name)
        counts += open_index(source, cache_dir).class_image_counts(len(counts), ids)
    return counts
