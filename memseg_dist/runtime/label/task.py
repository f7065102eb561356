"""One shard of images with labels -> the samples of one shard of pseudo labels.

All that a task needs to know is in `LabelTask`, plain values, so that it runs in any process; what
is costly to open is opened once per process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.data.cache import DEFAULT_CACHE_BYTES, ShardCache
from memseg_dist.data.decode import MASK_IGNORE, CorruptSample, decode_image
from memseg_dist.data.files import default_cache, is_url, join
from memseg_dist.data.index import Index, Row
from memseg_dist.data.recipe import Skipped
from memseg_dist.data.saliency import read_saliency
from memseg_dist.data.shards import Sample
from memseg_dist.evaluation.activation import AccumulatedMaps, Activation, predicted_maps
from memseg_dist.evaluation.fusion import FusionConfig, fuse
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.trained import Model, chosen_device, open_checkpoint

MapsKind = Literal["accumulated", "predicted"]
BACKGROUND = 0
"""Id of the background in the vocabulary that is written."""
NOTE = "pseudo"
"""Where a sample's JSON tells how its label map came about."""


@dataclass(frozen=True)
class LabelTask:
    """The images `start` .. `stop` - 1 of `data` and how to label them.

    digest: of the checkpoint's content, so that other weights are another task. to_space,
    to_output: per local id of `data` the label-space id of the checkpoint and the id that is
    written; IGNORE for labels that are left out.
    """

    checkpoint: str
    digest: int
    data: str
    start: int
    stop: int
    maps: MapsKind
    scales: tuple[float, ...]
    flip: bool
    device: str | None
    saliency: str | None
    fusion: FusionConfig
    to_space: tuple[int, ...]
    to_output: tuple[int, ...]


def label_samples(task: LabelTask) -> Iterator[Sample | Skipped]:
    """The task's images as they are, each with a label map. An unreadable image is skipped."""
    index = Index.open(task.data)
    for number in range(task.start, task.stop):
        row = index.row(number)
        content = image_bytes(index, row)
        try:
            image = decode_image(content, row.image_format)
        except CorruptSample as error:
            yield Skipped(row.key, str(error))
            continue
        yield _labelled(task, row, content, image)


def _labelled(task: LabelTask, row: Row, content: bytes, image: Tensor) -> Sample:
    space_ids, ids = known_classes(task, row.labels)
    activation = find_activation(task, row.key, image, space_ids)
    saliency = None
    if task.saliency is not None:
        size = (image.shape[1], image.shape[2])
        saliency = read_saliency(task.saliency, row.key, size).numpy().astype(np.float32) / 255
    fused = fuse(
        activation.maps,
        ids,
        image.permute(1, 2, 0).contiguous().numpy(),
        saliency,
        task.fusion,
        background=BACKGROUND,
    )
    mask = np.where(fused.labels == IGNORE, MASK_IGNORE, fused.labels).astype(np.uint16)
    note: dict[str, Any] = {
        **fused.counts._asdict(),
        "maps": len(ids),
        "maps_missing": activation.num_missing,
    }
    return Sample(row.key, content, row.image_format, tuple(ids), mask, {NOTE: note})


def known_classes(task: LabelTask, labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """An image's local labels -> its classes' label-space ids, ascending, and their output ids."""
    pairs = {(task.to_space[label], task.to_output[label]) for label in labels}
    kept = sorted(pair for pair in pairs if pair[0] != IGNORE)
    return [space for space, _ in kept], [output for _, output in kept]


def find_activation(
    task: LabelTask, key: str, image: Tensor, space_ids: Sequence[int]
) -> Activation:
    """The maps of an image's classes (label-space ids); image: uint8 [3, H, W]."""
    if task.maps == "accumulated":
        return _accumulated(task.checkpoint, task.digest)(key, space_ids)
    model = _model(task.checkpoint, task.digest, task.device)
    return predicted_maps(
        model.method, image, space_ids, scales=task.scales, flip=task.flip, device=model.device
    )


@functools.lru_cache(maxsize=1)
def _accumulated(checkpoint: str, digest: int) -> AccumulatedMaps:
    return AccumulatedMaps(Checkpoint(checkpoint).reader("maps"), preload=is_url(checkpoint))


@functools.lru_cache(maxsize=1)
def _model(checkpoint: str, digest: int, device: str | None) -> Model:
    return open_checkpoint(Checkpoint(checkpoint), chosen_device(device))


def image_bytes(index: Index, row: Row) -> bytes:
    """The image's file as it is stored."""
    shards = ShardCache(default_cache() / "shards", DEFAULT_CACHE_BYTES)
    with shards.open(join(index.root, row.shard)) as stream:
        return os.pread(stream.fileno(), row.image_size, row.image_offset)
