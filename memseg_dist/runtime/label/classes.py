"""Which classes are looked for, and which are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memseg_dist.batch import IGNORE
from memseg_dist.config import RunConfig
from memseg_dist.data.files import is_url
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class LabelClasses:
    """vocabulary: what is written. to_space, to_output: see `LabelTask`."""

    vocabulary: Vocabulary
    to_space: tuple[int, ...]
    to_output: tuple[int, ...]
    left_out: dict[str, int]


def choose_classes(
    index: Index, checkpoint: Checkpoint, background: str, num_images: int
) -> LabelClasses:
    """The background, then the trained classes of the label space that `index` can label.

    ValueError if images are labelled with classes that the label space does not have, or if no
    class is left.
    """
    space, uids = checkpoint.label_space, index.vocabulary.uids
    to_space = _local_to_space(index, checkpoint)
    values = index.labels_values[: int(index.labels_offsets[num_images])]
    num_labelled = np.bincount(values, minlength=len(uids))
    is_background = np.array([uid == background for uid in uids])
    if background in space.vocabulary:  # also where the run renamed it
        is_background |= to_space == space.vocabulary.index(background)
    unknown = [
        uids[local]
        for local in np.flatnonzero((num_labelled > 0) & (to_space == IGNORE) & ~is_background)
    ]
    if unknown:
        raise ValueError(
            f"--data {index.root}: its images are labelled with {len(unknown)} classes that the "
            f"run does not know, such as {unknown[:3]}; their objects would be called background. "
            "Give its vocabulary.json the uids of the training sets, or train with these classes"
        )
    trained = np.isin(to_space, trained_classes(checkpoint.config, space))
    kept = trained & ~is_background
    chosen = np.unique(to_space[kept])
    if len(chosen) == 0:
        raise ValueError(
            f"--data {index.root}: none of its {len(uids)} classes was trained by "
            f"{checkpoint.path}; label data with classes of the training sets"
        )
    output = np.searchsorted(chosen, to_space) + 1
    categories = [space.vocabulary.categories[class_id] for class_id in chosen]
    first = _background(background, index.vocabulary, space.vocabulary)
    left_out = np.flatnonzero((num_labelled > 0) & ~kept & ~is_background)
    return LabelClasses(
        Vocabulary((first, *categories)),
        tuple(np.where(kept, to_space, IGNORE).tolist()),
        tuple(np.where(kept, output, IGNORE).tolist()),
        {uids[local]: int(num_labelled[local]) for local in left_out},
    )


def trained_classes(config: RunConfig, space: LabelSpace) -> list[int]:
    """Label-space ids that some source supervises and does not exclude."""
    trained: set[int] = set()
    for source in config.sources:
        if source.supervision != "none":
            ids = space.classes(source.name).tolist()
            trained |= {i for i in ids if space.vocabulary.uids[i] not in source.exclude}
    return sorted(trained - {IGNORE})


def _local_to_space(index: Index, checkpoint: Checkpoint) -> np.ndarray:
    """int64 [local classes]: label-space ids, IGNORE where there is none. By the run's own mapping
    if `index` is one of its sources (which may rename classes), else by uid.
    """
    space, uids = checkpoint.label_space, index.vocabulary.uids
    for source in checkpoint.config.sources:
        if absolute(source.path) == index.root and len(space.ids(source.name)) == len(uids):
            return space.ids(source.name).astype(np.int64)
    known = space.vocabulary
    return np.array([known.index(uid) if uid in known else IGNORE for uid in uids])


def _background(uid: str, *vocabularies: Vocabulary) -> Category:
    for vocabulary in vocabularies:
        if uid in vocabulary:
            return vocabulary.categories[vocabulary.index(uid)]
    return Category(uid, uid)


def absolute(path: str) -> str:
    """Tasks may have another working directory."""
    return path if is_url(path) else str(Path(path).expanduser().resolve())
