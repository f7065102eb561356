"""`--smoke`: any job's stages cut down to seconds on two cores, on data drawn on the spot."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from memseg_dist.batch import derive_seed
from memseg_dist.config import Intervals, RunConfig
from memseg_dist.data.files import exists, join, write_atomically
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source
from memseg_dist.data.schema import INDEX_NAME
from memseg_dist.data.splits import split_name, split_path
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.stages import LabelConfig, Stage, is_reference
from memseg_dist.tools.shards import Sample, finish, write_shard


def shrunk(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The same stages on miniature data, with their vocabularies, slots, memories and references
    kept whole. Sources of the same shards stay sources of the same shards.

    What `draw` then draws has its place in the directory of the first run.
    """
    runs = [stage for stage in stages.values() if isinstance(stage, RunConfig)]
    suffix = f"-smoke-{time.strftime('%Y%m%d-%H%M%S')}"
    data = f"{runs[0].directory}{suffix}/data"
    paths: dict[str, str] = {}
    for source in (source for run in runs for source in run.sources):
        here = source.path if is_reference(source.path) else f"{data}/{source.name}"
        paths.setdefault(source.path, here)
    small: dict[str, Stage] = {}
    for name, stage in stages.items():
        if isinstance(stage, RunConfig):
            stage = _shrunk_run(stage, data, paths, suffix)
        elif isinstance(stage, LabelConfig):
            truth = paths.get(stage.truth) if stage.truth else None
            stage = replace(stage, data=paths.get(stage.data, stage.data), truth=truth)
        small[name] = stage
    return small


def _shrunk_run(run: RunConfig, data: str, paths: Mapping[str, str], suffix: str) -> RunConfig:
    validation = run.validation and replace(
        run.validation,
        path=f"{data}/{run.validation.name}",
        resize=(64, 64),
        window=64,
        stride=64,
        max_images=4,
        num_panels=2,
    )
    weights = run.backbone.pretrained if is_reference(run.backbone.pretrained) else ""
    return replace(
        run,
        name=run.name + suffix,
        sources=tuple(_shrunk_source(source, paths[source.path]) for source in run.sources),
        validation=validation,
        method=run.method.smoke(),
        backbone=BackboneConfig("test_vit", weights, image_size=64, drop_path=0.0),
        steps=4,
        every=Intervals(log=1, evaluate=4, checkpoint=2, poll=2),
        launch=replace(run.launch, workers=min(2, run.launch.workers_range[1]), max_failures=0),
        loader=replace(run.loader, processes=0, cache_dir=f"{data}/cache"),
    )


def _shrunk_source(source: Source, path: str) -> Source:
    """Pseudo masks that no stage writes are the masks of the shards; nor does one write a split."""
    is_written, pseudo_masks = is_reference(path), source.pseudo_masks
    if pseudo_masks is not None and not is_reference(pseudo_masks):
        pseudo_masks = path
    return replace(
        source,
        path=path,
        augment=replace(source.augment, crop=64, resize=(64, 64)),
        split=None if is_written or source.split is None else split_name(source.split),
        pseudo_masks=pseudo_masks,
    )


def draw(stages: Mapping[str, Stage], vocabularies: Mapping[str, Vocabulary]) -> None:
    """Miniature shards for every source and validation set that is not there, and their splits.

    vocabularies: their classes, by the names of the sources and validation sets.
    """
    runs = [stage for stage in stages.values() if isinstance(stage, RunConfig)]
    sources = [source for run in runs for source in run.sources]
    named = {source.path: source.name for source in reversed(sources)}
    named |= {run.validation.path: run.validation.name for run in runs if run.validation}
    with_masks = {source.path for source in sources if _has_masks(source)}
    with_masks |= {run.validation.path for run in runs if run.validation}
    missing = [p for p in named if not is_reference(p) and not exists(join(p, INDEX_NAME))]
    for path in missing:
        draw_miniature(
            Path(path),
            vocabularies[named[path]],
            with_masks=path in with_masks,
            num_images=max([8, *(source.slots for source in sources if source.path == path)]),
        )
    for source in sorted(sources, key=lambda source: source.slots):  # the last of a split has most
        if source.split is not None and source.path in missing:
            draw_split(split_path(source.path, source.split), Index.open(source.path), source.slots)


def _has_masks(source: Source) -> bool:
    shown = source.supervision == "masks" or source.hide_mask or source.labels_from == "crop"
    return shown or source.pseudo_masks == source.path


def draw_split(path: str, index: Index, num_slots: int) -> None:
    """The first half of the images and no fewer than slots, and so many that all classes of the
    masks occur.
    """
    number = max(-(-len(index) // 2), num_slots)
    if index.num_masks:
        _, first = np.unique(index.labels_values, return_index=True)
        number = max(number, int(np.searchsorted(index.labels_offsets, first, "right").max()))
    write_atomically(path, "".join(f"{key}\n" for key in [*index.all_keys()][:number]).encode())


def draw_miniature(
    root: Path,
    vocabulary: Vocabulary,
    *,
    with_masks: bool,
    num_images: int = 8,
    size: int = 72,
) -> None:
    """One shard of noisy colour fields, each field one class, spread over the whole vocabulary: so
    many images, or with masks more if it takes them to show every class of the first 1,000.
    """
    shown = min(len(vocabulary), 1000)
    order = np.random.default_rng(derive_seed("miniature", root.name)).permutation(shown)
    if with_masks:
        num_images = max(num_images, -(-shown // 4))

    def samples() -> Iterator[Sample]:
        for number in range(num_images):
            rng = np.random.default_rng(derive_seed("miniature", root.name, number))
            classes = order[np.arange(4 * number, 4 * number + 4) % shown]
            mask = np.kron(classes.reshape(2, 2), np.ones((size // 2, size // 2), int))
            pixels = rng.integers(0, 60, (size, size, 3)) + (mask[..., None] * [37, 91, 53]) % 190
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            labels = tuple(sorted({int(index) for index in classes}))
            yield Sample(
                f"{root.name}-{number:04d}",
                buffer.getvalue(),
                "png",
                labels if with_masks else labels[:1],
                mask.astype(np.uint16) if with_masks else None,
            )

    write_shard(root, 0, samples(), num_classes=len(vocabulary))
    finish(root, vocabulary)
