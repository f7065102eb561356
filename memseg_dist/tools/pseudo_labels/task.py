"""One shard of images -> the samples of one shard of pseudo labels.

All that a task needs to know is in `LabelTask`, plain values, so that it runs in any process; what
is costly to open is opened once per process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from memseg_dist.batch import IGNORE
from memseg_dist.data.cache import DEFAULT_CACHE_BYTES, ShardCache
from memseg_dist.data.decode import MASK_IGNORE, CorruptSample
from memseg_dist.data.files import default_cache
from memseg_dist.data.index import Index
from memseg_dist.data.reader import Reader
from memseg_dist.methods.labeller import Label, Labelled, LabellerConfig, Picture
from memseg_dist.tools.pictures.panels import Pixels, panel
from memseg_dist.tools.pseudo_labels.classes import LabelClasses
from memseg_dist.tools.pseudo_labels.model import CheckpointModel
from memseg_dist.tools.recipe import Skipped
from memseg_dist.tools.shards import Sample
from memseg_dist.train.checkpoint import Checkpoint

NOTE = "pseudo"
"""Where a sample's JSON tells how its label map came about."""


@dataclass(frozen=True)
class LabelTask:
    """The images `start` .. `stop` - 1 of `data` and how to label them.

    digest: of the checkpoint's content and of `classes`, so that other weights are another task.
    """

    checkpoint: str
    digest: int
    labeller: LabellerConfig
    device: str | None
    data: str
    start: int
    stop: int
    classes: LabelClasses = field(compare=False)

    def reader(self, ids: Sequence[int]) -> Reader:
        """Of `data`, with its local ids brought to `ids`."""
        shards = ShardCache(default_cache() / "shards", DEFAULT_CACHE_BYTES)
        return Reader(Index.open(self.data), shards, np.array(ids, dtype=np.int32))

    def label(self) -> Label:
        return _opened(self.labeller, self.checkpoint, self.digest, self.device)


@functools.lru_cache(maxsize=1)
def _opened(labeller: LabellerConfig, checkpoint: str, digest: int, device: str | None) -> Label:
    return labeller.open(CheckpointModel(Checkpoint(checkpoint), device))


def label_samples(task: LabelTask) -> Iterator[Sample | Skipped]:
    """The task's images as they are, each with a label map. An unreadable image is skipped."""
    reader, label = task.reader(task.classes.to_space), task.label()
    for number in range(task.start, task.stop):
        row = reader.index.row(number)
        try:
            decoded = reader.read(number, with_mask=False)
        except CorruptSample as error:
            yield Skipped(row.key, str(error))
            continue
        found = label(Picture(row.key, decoded.image, decoded.labels))
        mask = written_mask(task, found)
        # The classes of the image outlive the mask.
        labels = tuple(task.classes.written.index(class_id) for class_id in decoded.labels)
        num_unknown = int((mask == IGNORE).sum())
        note = {"labels": len(labels), "pixels": mask.size, "unknown": num_unknown, **found.note}
        stored = np.where(mask == IGNORE, MASK_IGNORE, mask).astype(np.uint16)
        image = reader.image_bytes(number)
        yield Sample(row.key, image, row.image_format, labels, stored, {NOTE: note})


def written_mask(task: LabelTask, found: Labelled) -> NDArray[np.integer]:
    """Label-space ids -> ids of the written vocabulary. ValueError for a class that has none."""
    ids = [found.background if i == IGNORE else i for i in task.classes.written]
    known = {class_id: number for number, class_id in enumerate(ids) if class_id is not None}
    table = np.full(max(*known, int(found.mask.max())) + 2, IGNORE)  # the last entry: IGNORE's
    table[[*known]] = [*known.values()]
    mask = table[found.mask]
    lost = np.unique(found.mask[(mask == IGNORE) & (found.mask != IGNORE)])
    if len(lost):
        raise ValueError(
            f"the labeller {task.labeller.kind!r} found the label-space ids {lost[:5].tolist()}, "
            "which are not written: neither its `classes` nor its `background_uid` has them"
        )
    return mask


def draw_labels(tasks: Sequence[LabelTask], num_pictures: int) -> Iterator[Pixels]:
    """uint8 [H, W, 3]: image | truth | pseudo label | maps of the first images."""
    for task in tasks:
        reader, label = task.reader(task.classes.to_space), task.label()
        truths = task.reader(task.classes.truth_to_written)
        for number in range(task.start, task.stop):
            if num_pictures == 0:
                return
            try:
                decoded = reader.read(number, with_mask=False)
                has_truth = truths.index.row(number).mask_size > 0
                truth = truths.read_mask(number).numpy() if has_truth else None
            except CorruptSample:
                continue
            num_pictures -= 1
            found = label(Picture(reader.index.key(number), decoded.image, decoded.labels))
            image = decoded.image.permute(1, 2, 0).numpy()
            yield panel(
                image,
                truth,
                written_mask(task, found),
                {title: _enlarged(low, image.shape[:2]) for title, low in found.maps.items()},
                task.classes.vocabulary.names,
                prediction_title="pseudo label",
            )


def _enlarged(low: NDArray[np.floating], size: tuple[int, ...]) -> NDArray[np.floating]:
    values = torch.from_numpy(np.asarray(low, np.float32))
    return F.interpolate(values[None, None], size, mode="bilinear")[0, 0].numpy()
