"""What a run is, told before its first step: data, classes, machine, and what looks like a mistake.

All of it comes from the indexes of the shards; no image is read.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from memseg_dist.assemble import build_label_space, scored_classes
from memseg_dist.batch import IGNORE
from memseg_dist.config import RunConfig, ValidationConfig
from memseg_dist.data.index import Index
from memseg_dist.data.pseudo_masks import ids_by_uid
from memseg_dist.data.source import Source, kept_ids, open_index
from memseg_dist.data.vocabulary import LabelSpace, fold
from memseg_dist.train.checkpoint import Checkpoint

LARGE_SHARE = 0.1
"""Of the masks' pixels: a class with more is large."""
MAX_NAMED = 10
"""A list of classes names so many, and counts the rest."""


@dataclass(frozen=True)
class DataSet:
    """One row of the overview: a source, or the validation set.

    teaches: masks, labels, none or validation. num_present: of its num_classes classes, how many a
    mask or label of it names. fingerprint: see `Index.fingerprint`.
    """

    name: str
    path: str
    teaches: str
    num_images: int
    num_classes: int
    num_present: int
    slots: str
    crop: str
    fingerprint: str


@dataclass(frozen=True)
class Overview:
    """title: the run in a line. facts: more lines by what they are about."""

    title: str
    data: tuple[DataSet, ...]
    facts: Mapping[str, str]
    warnings: tuple[str, ...]


def survey(
    config: RunConfig, device: torch.device, num_workers: int, checkpoint: str | None
) -> Overview:
    """What the run is; checkpoint: that it goes on from. ValueError for data that is not there."""
    space = build_label_space(config)
    sources, validation = config.active_sources, config.validation
    indexes = {source.name: open_index(source, config.cache_directory) for source in sources}
    present = {
        source.name: taught_classes(source, indexes[source.name], space, config.cache_directory)
        for source in sources
    }
    data = [_source_row(source, indexes[source.name], present[source.name], space)
            for source in sources]  # fmt: skip
    if validation is not None:
        data.append(_validation_row(validation, space, config.cache_directory))
    images = sum(source.slots * source.batch_per_slot for source in sources)
    workers = f"{num_workers} worker{'s' if num_workers > 1 else ''} on {device.type}"
    engine = config.engine.on(device)
    zero = f" (ZeRO {engine.zero_stage})" if engine.zero_stage else ""
    step = 0 if checkpoint is None else Checkpoint(checkpoint).step
    return Overview(
        f"{config.name}: {config.method.kind} on {config.backbone.name}, "  # type: ignore[attr-defined]
        f"{config.steps} steps of {images} images in {config.num_slots} slots, seed {config.seed}",
        tuple(data),
        {
            "classes": _describe_classes(config, space),
            "machine": f"{workers} ({config.launch.launcher}), {engine.kind}{zero}, "
            f"{engine.precision}",
            "starts": f"at step {step}, from {checkpoint}" if checkpoint else "at step 0",
            "writes": config.directory,
        },
        (
            *_untaught_classes(config, space, np.any([*present.values()], axis=0)),
            *_unnamed_classes(config, space, indexes, present),
        ),
    )


def taught_classes(
    source: Source, index: Index, space: LabelSpace, cache_dir: str
) -> NDArray[np.bool_]:
    """bool [C]: which classes of the label space a label, a mask or a pseudo mask of the source
    teaches.
    """
    is_taught = np.zeros(len(space), dtype=bool)
    taught = [(index, kept_ids(source, space))] if source.supervision != "none" else []
    if source.pseudo_masks is not None:
        masks = Index.open(source.pseudo_masks, cache_dir)
        taught.append((masks, ids_by_uid(masks.vocabulary, space, f"source {source.name!r}")))
    for of_images, ids in taught:
        is_taught |= of_images.class_image_counts(len(space), ids) > 0
    return is_taught


def _source_row(
    source: Source, index: Index, present: NDArray[np.bool_], space: LabelSpace
) -> DataSet:
    kept = np.setdiff1d(kept_ids(source, space), IGNORE)
    teaches = source.supervision + (" + pseudo masks" if source.pseudo_masks else "")
    height, width = source.augment.crop_size
    return DataSet(
        source.name, source.path, teaches, len(index), len(kept), int(present.sum()),
        f"{source.slots} x {source.batch_per_slot} images", f"{height} x {width}",
        index.fingerprint(),
    )  # fmt: skip


def _validation_row(settings: ValidationConfig, space: LabelSpace, cache_dir: str) -> DataSet:
    index, ids = Index.open(settings.path, cache_dir), space.ids(settings.name)
    num_present = int((index.class_image_counts(len(space), ids) > 0).sum())
    num_images = min(len(index), settings.max_images or len(index))
    return DataSet(
        settings.name, settings.path, "validation", num_images, len(space.classes(settings.name)),
        num_present, "", settings.mode, index.fingerprint(),
    )  # fmt: skip


def _describe_classes(config: RunConfig, space: LabelSpace) -> str:
    scored, settings = scored_classes(config, space), config.validation
    if scored is None or settings is None:
        return f"{len(space)}, none of them scored"
    groups = {"base": settings.base, "novel": settings.novel}
    parts = [f"{len(uids)} {group}" for group, uids in groups.items() if uids]
    return f"{len(space)}, {len(scored)} of them scored{': ' if parts else ''}{', '.join(parts)}"


def _untaught_classes(
    config: RunConfig, space: LabelSpace, is_taught: NDArray[np.bool_]
) -> Iterator[str]:
    scored = scored_classes(config, space)
    scored = np.zeros(0, np.int64) if scored is None else scored
    trained = np.concatenate([kept_ids(source, space) for source in config.active_sources])
    untaught = scored[~is_taught[scored]]
    if len(untaught):
        uids = [*config.validation.exclude] if config.validation else []
        uids += [space.vocabulary.uids[class_id] for class_id in untaught[:MAX_NAMED]]
        yield (
            f"{len(untaught)} of the {len(scored)} scored classes have neither a label nor a mask "
            f"in any source, so nothing teaches them: {_names(untaught, space)}. Add images that "
            "are labelled with them, or take them out of the score (where "
            "the flags have their stage's name, that comes first): --validation.exclude "
            f"{shlex.join(uids)}{' ...' if len(untaught) > MAX_NAMED else ''}"
        )
    others = np.setdiff1d(trained[(trained != IGNORE) & ~is_taught[trained]], scored)
    if len(others):
        yield (
            f"{len(others)} more classes of the sources' vocabularies have neither a label nor a "
            f"mask: {_names(others, space)}"
        )


def _unnamed_classes(
    config: RunConfig,
    space: LabelSpace,
    indexes: Mapping[str, Index],
    present: Mapping[str, NDArray[np.bool_]],
) -> Iterator[str]:
    """Large classes of the masks that no source with image labels ever names."""
    with_labels = [s.name for s in config.active_sources if s.supervision == "labels"]
    with_masks = [s for s in config.active_sources if s.supervision == "masks"]
    if not (config.method.labels_name_all and with_labels and with_masks):
        return
    pixels = np.zeros(len(space), dtype=np.int64)
    for source in with_masks:
        ids = kept_ids(source, space)
        of_class = indexes[source.name].class_pixel_counts(len(ids))
        np.add.at(pixels, ids[ids != IGNORE], of_class[ids != IGNORE])
    shares = pixels / max(pixels.sum(), 1)
    is_named = np.any([present[name] for name in with_labels], axis=0)
    unnamed = np.flatnonzero((shares > LARGE_SHARE) & ~is_named)
    unnamed = unnamed[np.argsort(-shares[unnamed], kind="stable")]
    if len(unnamed):
        categories = [space.vocabulary.categories[class_id] for class_id in unnamed]
        yield (
            f"no source with image labels ({', '.join(with_labels)}) names "
            + ", ".join(
                f"{category.name!r}, which has {shares[class_id]:.0%} of the masks' pixels"
                + _namesake(int(class_id), np.flatnonzero(is_named), space)
                for class_id, category in zip(unnamed, categories, strict=True)
            )
            + ". The method takes what labels leave out for a part of what they name, so a class "
            "that often occurs with it may be learnt as all of it. Add it to the labels of the "
            "images that show it, or exclude it from the sources with masks and from the score "
            f"(--sources.N.exclude {categories[0].uid} --validation.exclude {categories[0].uid})"
        )


def _namesake(class_id: int, others: NDArray[np.integer], space: LabelSpace) -> str:
    """What is said of a class whose name one of `others` has too."""
    uids, names = space.vocabulary.uids, [fold(name) for name in space.vocabulary.names]
    same = [uids[other] for other in others if names[other] == names[class_id]]
    if not same:
        return ""
    return (
        f" (its uid is {uids[class_id]!r}; they name {same[0]!r}, another class of this name: give "
        "both one uid if they are one)"
    )


def _names(ids: Sequence[int] | NDArray[np.integer], space: LabelSpace) -> str:
    names = [space.vocabulary.names[class_id] for class_id in ids[:MAX_NAMED]]
    rest = len(ids) - len(names)
    return ", ".join(names) + (f" and {rest} more" if rest else "")
