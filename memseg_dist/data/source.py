"""A data set's part in a run: how its samples become batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.batch import IGNORE, UNREADABLE, Batch, Supervision, derive_seed
from memseg_dist.checks import NotNegativeInt, PositiveInt, check_numbers, check_pairs, require
from memseg_dist.data.augment import AugmentConfig, Augmented, augment, swap_ids
from memseg_dist.data.cache import ShardCache
from memseg_dist.data.decode import CorruptSample
from memseg_dist.data.index import Index
from memseg_dist.data.order import Draw
from memseg_dist.data.pseudo_masks import PseudoMasks
from memseg_dist.data.reader import Reader
from memseg_dist.data.saliency import check_has_saliency, read_saliency
from memseg_dist.data.splits import read_split, split_path
from memseg_dist.data.vocabulary import LabelSpace


@dataclass(frozen=True)
class Source:
    """One data set in a run and how its samples become batches."""

    name: str
    """Its key in the label space."""
    path: str
    """Folder or fsspec URL of the shards."""
    supervision: Supervision
    """masks: every sample has one; labels: image labels only; none: neither masks nor labels are
    looked at, whatever the shards have."""
    slots: NotNegativeInt = 1
    """Its micro-batches of a step. 0: it gives the label space its classes and is not read."""
    batch_per_slot: PositiveInt = 2
    """Samples in a micro-batch."""
    augment: AugmentConfig = AugmentConfig()
    """How its images are cut into crops and changed."""
    split: str | None = None
    """Name of a list of keys kept with the shards (`memseg data split`), or the path of one: the
    source is these samples alone. None: all samples."""
    exclude: tuple[str, ...] = ()
    """Uids of classes whose pixels become unknown and whose labels are dropped."""
    labels_from: Literal["index", "crop"] = "index"
    """index: the labels of the whole image; crop: the classes in the mask of the augmented crop at
    half its size, as LarvSeg does with ADE20K."""
    hide_mask: bool = False
    """Use masks for nothing but `labels_from` crop, not even for choosing the crop."""
    repeat_threshold: float | None = None
    """Class-balanced order: an image whose rarest class is in a share f of all images comes
    sqrt(threshold / f) times an epoch, at least once. None: every image once."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """skip: a sample that cannot be read is left blank and counted; raise: it ends the run."""
    group: PositiveInt = 16
    """So many shards are shuffled together."""
    saliency: str | None = None
    """Folder or fsspec URL of 8-bit grey PNGs KEY.png of the images' sizes, 255 = salient; they are
    cut as the images are."""
    pseudo_masks: str | None = None
    """Folder or URL of shards with masks of the same keys, as the label stage writes them; they are
    cut as the images are, whatever the supervision."""
    swap_on_flip: tuple[tuple[str, str], ...] = ()
    """Pairs of uids of classes that a mirror turns into each other, as a left and a right arm:
    masks and labels of a flipped crop are swapped."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "swap_on_flip", tuple(map(tuple, self.swap_on_flip)))
        where = f"source {self.name!r}: "
        check_pairs(self.swap_on_flip, where + "swap_on_flip")
        check_numbers(self, where)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            require(value in known, where + name, value, f"one of {known}")
        if self.supervision == "masks" and self.hide_mask:
            raise ValueError(
                f"source {self.name!r}: supervision 'masks' with hide_mask; use 'labels' or 'none'"
            )
        if self.supervision == "none" and self.repeat_threshold is not None:
            raise ValueError(
                f"source {self.name!r}: supervision 'none' with repeat_threshold "
                f"{self.repeat_threshold}, which balances the classes by their labels; use None"
            )
        require(self.split != "", where + "split", "", "a name or a path, or None for all samples")

    @property
    def looks_at_masks(self) -> bool:
        """Whether a mask is read at all."""
        return self.supervision != "none" and (not self.hide_mask or self.labels_from == "crop")


_CHOICES = {
    "supervision": ("masks", "labels", "none"),
    "labels_from": ("index", "crop"),
    "on_corrupt": ("raise", "skip"),
}


class SourceReader:
    """Makes the batches of one source."""

    def __init__(
        self, source: Source, label_space: LabelSpace, seed: int, cache_dir: Path, cache_bytes: int
    ) -> None:
        self.source = source
        self.index = open_index(source, cache_dir)
        self.kept_ids = kept_ids(source, label_space)
        check_source(source, self.index, len(self.kept_ids))
        self._swap = swapped_ids(source, label_space)
        if source.saliency is not None:
            check_has_saliency(source.saliency, self.index.key(0))
        shards = ShardCache(cache_dir / "shards", cache_bytes)
        self._reader = Reader(self.index, shards, self.kept_ids)
        self._pseudo_masks = None
        if source.pseudo_masks is not None:
            self._pseudo_masks = PseudoMasks(
                source.pseudo_masks, self.index, label_space, source.exclude, cache_dir, shards,
                where=f"source {source.name!r}",
            )  # fmt: skip
        self._seed = seed

    def fingerprints(self) -> dict[str, str]:
        """By what they are of: the source's samples, and its pseudo masks. See `Index`."""
        name, indexes = self.source.name, {self.source.name: self.index}
        if self._pseudo_masks is not None:
            indexes[f"{name}.pseudo_masks"] = self._pseudo_masks.index
        return {part: index.fingerprint() for part, index in indexes.items()}

    def batch(self, draws: Sequence[Draw]) -> Batch:
        source = self.source
        crops, labels, keys, skipped = [], [], [], 0
        for draw in draws:
            key = self.index.key(draw.row)
            try:
                crop, present = self._sample(draw, key)
            except CorruptSample:
                if source.on_corrupt == "raise":
                    raise
                crop, present = _blank(source.augment.crop_size), ()
                skipped += 1
            crops.append(crop)
            labels.append(present)
            keys.append(key)
        masks = saliency = pseudo_masks = None
        if source.supervision == "masks":
            masks = torch.stack([known(crop.mask) for crop in crops])
        if source.saliency is not None:
            saliency = torch.stack([known(crop.saliency) for crop in crops])
        if source.pseudo_masks is not None:
            pseudo_masks = torch.stack([known(crop.pseudo_mask) for crop in crops])
        return Batch(
            images=torch.stack([crop.image for crop in crops]),
            valid=torch.stack([crop.valid for crop in crops]),
            masks=masks,
            labels=tuple(labels),
            source=source.name,
            supervision=source.supervision,
            keys=tuple(keys),
            skipped=skipped,
            crop_boxes=() if source.augment.rotate else tuple(crop.crop_box for crop in crops),
            saliency=saliency,
            pseudo_masks=pseudo_masks,
        )

    def _sample(self, draw: Draw, key: str) -> tuple[Augmented, tuple[int, ...]]:
        source = self.source
        image, mask, labels = self._reader.read(draw.row, source.looks_at_masks)
        saliency = pseudo_mask = None
        if source.saliency is not None:
            saliency = read_saliency(source.saliency, key, (image.shape[1], image.shape[2]))
        if self._pseudo_masks is not None:
            pseudo_mask = self._pseudo_masks.read(draw.row)
        copy = (draw.copy,) if draw.copy else ()  # a repeat is augmented in its own way
        seed = derive_seed(self._seed, "augment", draw.epoch, key, *copy)
        by_mask = not source.hide_mask
        crop = augment(image, mask, source.augment, seed, by_mask, saliency, pseudo_mask)
        if crop.crop_box.flipped and self._swap:
            crop, labels = self._swapped(crop, labels)
        if source.supervision == "none":
            return crop, ()
        from_crop = source.labels_from == "crop"
        return crop, classes_at_half_size(known(crop.mask)) if from_crop else labels

    def _swapped(
        self, crop: Augmented, labels: tuple[int, ...]
    ) -> tuple[Augmented, tuple[int, ...]]:
        """What a mirror shows, with the classes of `swap_on_flip` in each other's place."""
        mask, pseudo_mask = (
            None if ids is None else swap_ids(ids, self._swap)
            for ids in (crop.mask, crop.pseudo_mask)
        )
        ids = torch.tensor(labels, dtype=torch.int64)
        swapped = tuple(sorted(swap_ids(ids, self._swap).tolist()))
        return crop._replace(mask=mask, pseudo_mask=pseudo_mask), swapped


def open_index(source: Source, cache_dir: str | Path) -> Index:
    """The index of a source: of the samples of its split, if it has one.

    ValueError for a split that is not there, or names keys that the shards lack.
    """
    index = Index.open(source.path, cache_dir)
    if source.split is None:
        return index
    where = f"source {source.name!r}"
    try:
        keys = read_split(source.path, source.split)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    try:
        return index.only(keys)
    except ValueError as error:
        path = split_path(source.path, source.split)
        raise ValueError(f"{where}, split {path}: {error}") from error


def known(pixels: Tensor | None) -> Tensor:
    assert pixels is not None, "check_source lets no sample without them come here"
    return pixels


def classes_at_half_size(mask: Tensor) -> tuple[int, ...]:
    """The classes of an int [H, W] mask after nearest down-sampling to H/2 x W/2, ascending."""
    present = mask[::2, ::2].unique()
    return tuple(present[present != IGNORE].tolist())


def _blank(size: tuple[int, int]) -> Augmented:
    mask = torch.full(size, IGNORE, dtype=torch.int32)
    valid = torch.zeros(size, dtype=torch.bool)
    image, saliency = torch.zeros(3, *size, dtype=torch.uint8), torch.full(size, -1.0)
    return Augmented(image, valid, mask, UNREADABLE, saliency, pseudo_mask=mask)


def check_source(source: Source, index: Index, num_classes: int) -> None:
    where = f"source {source.name!r} at {source.path}"
    if len(index) == 0:
        raise ValueError(f"{where} has no samples; check the path or write the data set again")
    index.check_labels(num_classes)
    if index.num_unreadable and source.on_corrupt == "raise":
        raise ValueError(
            f"{where}: {index.num_unreadable} of {len(index)} samples could not be read when they "
            f"were indexed; `memseg data verify {source.path}` lists them. Leave them out of the "
            "shards and index anew, or set on_corrupt='skip'"
        )
    from_crop = source.supervision == "labels" and source.labels_from == "crop"
    needs = source.supervision == "masks" or from_crop
    if needs and index.num_masks < len(index):
        raise ValueError(
            f"{where}: {len(index) - index.num_masks} of {len(index)} samples have no mask, which "
            f"supervision {source.supervision!r} with labels_from {source.labels_from!r} needs"
        )
    index.check_shards()


def kept_ids(source: Source, label_space: LabelSpace) -> NDArray[np.int32]:
    """Local id -> label-space id of `source`, IGNORE for what it excludes.

    ValueError for an excluded uid that the label space does not have.
    """
    ids = label_space.ids(source.name)
    try:
        excluded = [label_space.vocabulary.index(uid) for uid in source.exclude]
    except KeyError as error:
        raise ValueError(f"source {source.name!r}, exclude: {error.args[0]}") from error
    return np.where(np.isin(ids, excluded), np.int32(IGNORE), ids)


def swapped_ids(source: Source, label_space: LabelSpace) -> tuple[tuple[int, int], ...]:
    """`source.swap_on_flip` as label-space ids; ValueError for a class that the source has not."""
    where = f"source {source.name!r}, swap_on_flip"
    pairs = label_space.vocabulary.index_pairs(source.swap_on_flip, where)
    kept = kept_ids(source, label_space)
    for uids, ids in zip(source.swap_on_flip, pairs, strict=True):
        for uid, class_id in zip(uids, ids, strict=True):
            if class_id not in kept:
                raise ValueError(
                    f"{where}: {uid!r} is no class of its vocabulary, or is excluded; leave out "
                    f"the pair {uids}"
                )
    return pairs


def supervised_ids(
    sources: Sequence[Source], label_space: LabelSpace, *kinds: Supervision
) -> NDArray[np.int64]:
    """Label-space ids that sources with one of these supervisions have and keep, ascending."""
    ids = [kept_ids(source, label_space) for source in sources if source.supervision in kinds]
    return np.setdiff1d(np.concatenate([np.zeros(0, np.int64), *ids]), IGNORE)
