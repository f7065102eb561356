"""Pictures of a label run: image | truth | pseudo label | strongest map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from memseg_dist.data.cache import DEFAULT_CACHE_BYTES, ShardCache
from memseg_dist.data.files import default_cache
from memseg_dist.data.index import Index
from memseg_dist.data.reader import Decoded, Reader
from memseg_dist.evaluation.activation import Activation
from memseg_dist.evaluation.panels import Pixels, panel
from memseg_dist.runtime.label.task import BACKGROUND, LabelTask, find_activation, known_classes


def draw_labels(root: Path, tasks: Sequence[LabelTask], num_pictures: int) -> Iterator[Pixels]:
    """uint8 [H, W, 3] panels of the first images that were written to `root`."""
    written = Index.open(root)
    reader = _reader(written, np.arange(len(written.vocabulary)))
    for number, (task, row) in enumerate(_sources(written, tasks)):
        if number == num_pictures:
            return
        source = Index.open(task.data)
        labelled = reader.read(number, with_mask=True)
        true = _reader(source, _truth_ids(task, source, written)).read(row, with_mask=True)
        yield np.asarray(_panel(task, source.key(row), source.labels(row), labelled, true, written))


def _panel(
    task: LabelTask,
    key: str,
    labels: Sequence[int],
    labelled: Decoded,
    true: Decoded,
    written: Index,
):
    names = written.vocabulary.names
    space_ids, ids = known_classes(task, labels)
    activation = find_activation(task, key, labelled.image, space_ids)
    maps = {}
    if ids:
        size = (labelled.image.shape[1], labelled.image.shape[2])
        number, values = strongest(activation, size)
        maps[f"map: {names[ids[number]]}"] = values
    assert labelled.mask is not None, "every written sample has a mask"
    return panel(
        labelled.image.permute(1, 2, 0).numpy(),
        None if true.mask is None else true.mask.numpy(),
        labelled.mask.numpy(),
        maps,
        names,
        prediction_title="pseudo label",
    )


def strongest(activation: Activation, size: tuple[int, int]) -> tuple[int, NDArray[np.floating]]:
    """Of n maps the one with the highest peak (then mean): its number, and it at `size`, 0..1."""
    maps = torch.from_numpy(activation.maps.astype(np.float32))
    peaks = [(float(values.max()), float(values.mean())) for values in maps]
    number = peaks.index(max(peaks))
    large = F.interpolate(maps[None, number : number + 1], size, mode="bilinear")[0, 0]
    return number, (large / (peaks[number][0] or 1)).numpy()


def _sources(written: Index, tasks: Sequence[LabelTask]) -> Iterator[tuple[LabelTask, int]]:
    """Task and row in its data of each row of `written`: the same order, with images left out."""
    number = 0
    for task in tasks:
        source = Index.open(task.data)
        for row in range(task.start, task.stop):
            if number < len(written) and written.key(number) == source.key(row):
                number += 1
                yield task, row


def _truth_ids(task: LabelTask, source: Index, written: Index) -> NDArray[np.integer]:
    """Per local id of the source the id that was written for it."""
    background = written.vocabulary.uids[BACKGROUND]
    is_background = np.array([uid == background for uid in source.vocabulary.uids])
    return np.where(is_background, BACKGROUND, task.to_output)


def _reader(index: Index, ids: NDArray[np.integer]) -> Reader:
    shards = ShardCache(default_cache() / "shards", DEFAULT_CACHE_BYTES)
    return Reader(index, shards, ids.astype(np.int32))
