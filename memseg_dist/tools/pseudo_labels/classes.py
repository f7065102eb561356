"""Which classes are looked for, and which are written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memseg_dist.batch import IGNORE
from memseg_dist.data.files import absolute
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, Vocabulary, is_background
from memseg_dist.methods.labeller import LabellerConfig
from memseg_dist.tools.pseudo_labels.model import CheckpointModel


@dataclass(frozen=True)
class LabelClasses:
    """vocabulary: what is written; the background first, if the labeller has one.

    written: the label-space id of each written class, IGNORE for the background. to_space: per
    local id of the images' vocabulary the label-space id, IGNORE for labels that are left out.
    truth_to_written: the same for their masks, in ids that are written.
    left_out: uid -> images with a label that the run did not train.
    """

    vocabulary: Vocabulary
    written: tuple[int, ...]
    to_space: tuple[int, ...]
    truth_to_written: tuple[int, ...]
    left_out: dict[str, int]


def choose_classes(
    index: Index, model: CheckpointModel, labeller: LabellerConfig, num_images: int
) -> LabelClasses:
    """ValueError if images are labelled with classes that the label space does not have, or if no
    class is left.
    """
    space, uids, background = model.label_space, index.vocabulary.uids, labeller.background_uid
    to_space = _local_to_space(index, model)
    values = index.labels_values[: int(index.labels_offsets[num_images])]
    num_labelled = np.bincount(values, minlength=len(uids))
    no_class = np.array(
        [background is not None and (uid == background or is_background(uid)) for uid in uids]
    )
    if background is not None and background in space.vocabulary:  # also where it was renamed
        no_class |= to_space == space.vocabulary.index(background)
    unknown = [
        uids[local]
        for local in np.flatnonzero((num_labelled > 0) & (to_space == IGNORE) & ~no_class)
    ]
    if unknown:
        raise ValueError(
            f"--data {index.root}: its images are labelled with {len(unknown)} classes that the "
            f"run does not know, such as {unknown[:3]}; their objects would be called something "
            "else. Give its vocabulary.json the uids of the training sets, or train with these "
            "classes"
        )
    chosen = labeller.classes(model.trained, np.unique(to_space[~no_class]))
    if background is not None and background in space.vocabulary:
        chosen = chosen[chosen != space.vocabulary.index(background)]
    if len(chosen) == 0:
        raise ValueError(
            f"--data {index.root}: none of its {len(uids)} classes was trained by {model.path}; "
            "label data with classes of the training sets"
        )
    kept = np.isin(to_space, chosen) & ~no_class
    categories = [space.vocabulary.categories[class_id] for class_id in chosen]
    written = chosen.tolist()
    position = np.searchsorted(chosen, to_space)
    if background is not None:
        position += 1
        categories.insert(0, _background(background, index.vocabulary, space.vocabulary))
        written.insert(0, IGNORE)
    left_out = np.flatnonzero((num_labelled > 0) & ~kept & ~no_class)
    return LabelClasses(
        Vocabulary(tuple(categories)),
        tuple(written),
        tuple(np.where(kept, to_space, IGNORE).tolist()),
        tuple(np.where(no_class, 0, np.where(kept, position, IGNORE)).tolist()),
        {uids[local]: int(num_labelled[local]) for local in left_out},
    )


def _local_to_space(index: Index, model: CheckpointModel) -> NDArray[np.int64]:
    """int64 [local classes]: label-space ids, IGNORE where there is none. By the run's own mapping
    if `index` is one of its sources (which may rename classes), else by uid.
    """
    space, uids = model.label_space, index.vocabulary.uids
    for source in model.checkpoint.config.sources:
        if absolute(source.path) == index.root and len(space.ids(source.name)) == len(uids):
            return space.ids(source.name).astype(np.int64)
    known = space.vocabulary
    ids = [known.index(uid) if uid in known else IGNORE for uid in uids]
    return np.array(ids, dtype=np.int64)


def _background(uid: str, *vocabularies: Vocabulary) -> Category:
    for vocabulary in vocabularies:
        if uid in vocabulary:
            return vocabulary.categories[vocabulary.index(uid)]
    return Category(uid, uid)
