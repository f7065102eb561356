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
from memseg_dist.data.files import exists, join
from memseg_dist.data.loader import Source
from memseg_dist.data.schema import INDEX_NAME
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.stages import LabelConfig, Stage, is_reference
from memseg_dist.tools.shards import Sample, finish, write_shard


def shrunk(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The same stages on miniature data, with their vocabularies, slots, memories and references
    kept whole.

    What `draw` then draws has its place in the directory of the first run.
    """
    runs = [stage for stage in stages.values() if isinstance(stage, RunConfig)]
    suffix = f"-smoke-{time.strftime('%Y%m%d-%H%M%S')}"
    data = f"{runs[0].directory}{suffix}/data"
    paths = {source.path: f"{data}/{source.name}" for run in runs for source in run.sources}
    small: dict[str, Stage] = {}
    for name, stage in stages.items():
        if isinstance(stage, RunConfig):
            stage = _shrunk_run(stage, data, suffix)
        elif isinstance(stage, LabelConfig):
            truth = paths.get(stage.truth) if stage.truth else None
            stage = replace(stage, data=paths.get(stage.data, stage.data), truth=truth)
        small[name] = stage
    return small


def _shrunk_run(run: RunConfig, data: str, suffix: str) -> RunConfig:
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
        sources=tuple(_shrunk_source(source, data) for source in run.sources),
        validation=validation,
        method=run.method.smoke(),
        backbone=BackboneConfig("test_vit", weights, image_size=64, drop_path=0.0),
        steps=4,
        every=Intervals(log=1, evaluate=4, checkpoint=2, poll=2),
        launch=replace(run.launch, workers=min(2, run.launch.workers_range[1]), max_failures=0),
        loader=replace(run.loader, processes=0, cache_dir=f"{data}/cache"),
    )


def _shrunk_source(source: Source, data: str) -> Source:
    path = source.path if is_reference(source.path) else f"{data}/{source.name}"
    return replace(source, path=path, augment=replace(source.augment, crop=64, resize=(64, 64)))


def draw(stages: Mapping[str, Stage], vocabularies: Mapping[str, Vocabulary]) -> None:
    """Miniature shards for every source and validation set that is not there.

    vocabularies: their classes, by the names of the sources and validation sets.
    """
    for run in stages.values():
        if not isinstance(run, RunConfig):
            continue
        wanted = {source.name: (source.path, _has_masks(source)) for source in run.sources}
        if run.validation is not None:
            wanted[run.validation.name] = (run.validation.path, True)
        for name, (path, with_masks) in wanted.items():
            if not is_reference(path) and not exists(join(path, INDEX_NAME)):
                draw_miniature(Path(path), vocabularies[name], with_masks=with_masks)


def _has_masks(source: Source) -> bool:
    return source.supervision == "masks" or source.hide_mask or source.labels_from == "crop"


def draw_miniature(root: Path, vocabulary: Vocabulary, *, with_masks: bool, size: int = 72) -> None:
    """One shard of noisy colour fields, each field one class, spread over the whole vocabulary: 8
    images, or with masks as many as it takes to show every class of the first 1,000.
    """
    shown = min(len(vocabulary), 1000)
    order = np.random.default_rng(derive_seed("miniature", root.name)).permutation(shown)
    num_images = max(8, -(-shown // 4)) if with_masks else 8

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
