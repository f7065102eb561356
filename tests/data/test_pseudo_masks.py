"""Pseudo masks in shards of their own: of the same pixels as the masks, in the run's classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from data.made import NUM_CLASSES, SPACE, VOCABULARY, blocks, encoded, sample, write

from memseg_dist.batch import IGNORE
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.decode import CorruptSample
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source, TrainLoader
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.shards import Sample, finish, write_shard

TURNING = AugmentConfig((64, 48), (0.5, 2.0), 32, rotate=30.0)
# Another order of classes; two that no source has a sample of come first, one is left out.
LOCAL = (5, 3, 0, 1, 2)
PSEUDO = Vocabulary(tuple(VOCABULARY.categories[number] for number in LOCAL))


def pseudo_mask(number):
    """What the sample's mask says, in PSEUDO's ids; class 4 is unknown."""
    mask = blocks(number)
    stored = np.full_like(mask, 65535)
    for local, original in enumerate(LOCAL):
        stored[mask == original] = local
    return stored


def write_pseudo(root, numbers, mask=pseudo_mask, vocabulary=PSEUDO):
    """Pseudo masks of these samples, in shards that are cut otherwise than the source's."""
    for shard, first in enumerate(range(0, len(numbers), 4)):
        samples = [
            Sample(sample(number).key, encoded(number), "jpg", (), mask(number))
            for number in numbers[first : first + 4]
        ]
        write_shard(root, shard, samples, num_classes=len(vocabulary))
    finish(root, vocabulary)
    return str(root)


@pytest.fixture
def pseudo(tmp_path):
    return write_pseudo(tmp_path / "pseudo", list(range(19))[::-1])  # two more than there are


def batches(source, steps=6, **settings):
    loader = TrainLoader([source], SPACE, seed=1, **settings)
    return [batch for micro_batches in loader.steps(0, steps) for batch, _ in micro_batches]


def without_class_4(masks):
    return torch.where(masks == 4, IGNORE, masks)


def test_fingerprints_tell_what_has_changed(masks_root, pseudo, tmp_path):
    def fingerprints(keys, pseudo_masks):
        (tmp_path / "list.txt").write_text("\n".join(keys))
        source = Source("masks", str(masks_root), "masks", split=str(tmp_path / "list.txt"))
        return TrainLoader(
            [replace(source, pseudo_masks=pseudo_masks)], SPACE, seed=1
        ).fingerprints()

    keys = [sample(number).key for number in range(4)]
    first = fingerprints(keys, pseudo)
    assert [*first] == ["masks", "masks.pseudo_masks"] and fingerprints(keys, pseudo) == first
    assert fingerprints(keys, None) == {"masks": first["masks"]}
    assert fingerprints(keys[:3], pseudo)["masks"] != first["masks"]
    other = write_pseudo(tmp_path / "other", range(19), lambda number: pseudo_mask(number + 1))
    changed = fingerprints(keys, other)
    assert changed["masks"] == first["masks"] and changed != first


@pytest.mark.parametrize("num_processes", [0, 1])
@pytest.mark.parametrize("augment", [TURNING, replace(TURNING, rotate=0.0)])
def test_they_are_cut_as_the_masks_are(masks_root, pseudo, augment, num_processes):
    source = Source("masks", str(masks_root), "masks", 1, 17, augment, pseudo_masks=pseudo)
    num_unknown = num_padded = num_pixels = 0
    for batch in batches(source, num_processes=num_processes):
        assert (batch.pseudo_masks.dtype, batch.to("cpu").pseudo_masks.dtype) == (
            torch.int32,
            torch.int64,
        )
        assert torch.equal(batch.pseudo_masks, without_class_4(batch.masks))
        assert (batch.pseudo_masks[~batch.valid] == IGNORE).all()
        num_padded += int((~batch.valid).sum())
        num_unknown += int((batch.pseudo_masks == IGNORE).sum())
        num_pixels += batch.valid.numel()
    assert 0 < num_padded < num_unknown < num_pixels / 2


def test_nothing_else_changes_and_nothing_comes_without(masks_root, pseudo):
    source = Source("masks", str(masks_root), "masks", 1, 17, TURNING, pseudo_masks=pseudo)
    for ours, plain in zip(batches(source), batches(replace(source, pseudo_masks=None))):
        assert plain.pseudo_masks is None
        assert torch.equal(ours.images, plain.images) and torch.equal(ours.masks, plain.masks)
        assert ours.labels == plain.labels
    moved = ours.to("meta")
    assert moved.pseudo_masks.device.type == moved.masks.device.type == "meta"


@pytest.mark.parametrize("supervision", ["labels", "none"])
def test_a_source_without_masks_has_them_too(masks_root, pseudo, supervision, monkeypatch):
    free = replace(TURNING, category_max_ratio=1.0)
    source = Source("masks", str(masks_root), supervision, 1, 17, free, pseudo_masks=pseudo)
    expected = batches(replace(source, supervision="masks"))
    for ours, theirs in zip(batches(source), expected, strict=True):
        assert ours.masks is None
        assert torch.equal(ours.pseudo_masks, theirs.pseudo_masks)


def test_they_do_not_choose_the_crop(masks_root, pseudo):
    """The crop is drawn by the mask, where there is one to be looked at, and else by nothing."""
    narrow = AugmentConfig((40, 30), crop=16, category_max_ratio=0.5)
    source = Source("masks", str(masks_root), "none", 1, 17, narrow, pseudo_masks=pseudo)
    without = batches(replace(source, pseudo_masks=None))
    for ours, theirs in zip(batches(source), without, strict=True):
        assert torch.equal(ours.images, theirs.images)


def test_classes_change_places_and_are_excluded_as_in_masks(masks_root, pseudo):
    source = Source("masks", str(masks_root), "masks", 1, 17, TURNING, pseudo_masks=pseudo)
    plain = batches(source)
    for changed in (
        replace(source, swap_on_flip=(("n1", "n3"), ("n0", "n2"))),
        replace(source, exclude=("n2", "n5")),
    ):
        for batch, before in zip(batches(changed), plain, strict=True):
            assert torch.equal(batch.pseudo_masks, without_class_4(batch.masks))
            assert not torch.equal(batch.pseudo_masks, before.pseudo_masks)


def test_of_a_split_only_the_splits_are_needed(masks_root, tmp_path):
    numbers = (2, 11, 16)
    pseudo = write_pseudo(tmp_path / "few", numbers)
    (tmp_path / "few.txt").write_text("\n".join(sample(number).key for number in numbers))
    split = str(tmp_path / "few.txt")
    source = Source("masks", str(masks_root), "masks", 1, 3, TURNING, split=split)
    for batch in batches(replace(source, pseudo_masks=pseudo)):
        assert torch.equal(batch.pseudo_masks, without_class_4(batch.masks))
    message = (
        r"source 'masks', pseudo_masks .*few: 14 of the source's 17 samples are not there: "
        r"'image0000', 'image0001', 'image0003', \.\.\.; the label stage leaves out .*on_corrupt"
    )
    with pytest.raises(ValueError, match=message):
        batches(replace(source, split=None, pseudo_masks=pseudo))


def test_a_class_that_the_run_does_not_have(masks_root, tmp_path):
    more = Vocabulary((*PSEUDO.categories, Category("z", "zebra")))
    pseudo = write_pseudo(tmp_path / "more", range(17), vocabulary=more)
    source = Source("masks", str(masks_root), "none", 1, 17, TURNING, pseudo_masks=pseudo)
    with pytest.raises(ValueError, match="1 of its 6 classes are none of this run: 'z'; name sha"):
        batches(source)


def test_shards_without_masks(masks_root, tmp_path):
    write(tmp_path / "labels", (17,), with_masks=False)
    source = Source("masks", str(masks_root), "none", pseudo_masks=str(tmp_path / "labels"))
    with pytest.raises(ValueError, match=r"17 of the source's 17 samples have no mask there: 'im"):
        batches(source)
    source = replace(source, pseudo_masks=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no data set at .*nowhere"):
        batches(source)


def test_masks_of_another_size(masks_root, tmp_path):
    samples = [
        Sample(sample(n).key, encoded(n, 20, 30), "jpg", (), blocks(n, 20, 30))
        if n == 3
        else sample(n)
        for n in range(17)
    ]
    write_shard(tmp_path, 0, samples, num_classes=NUM_CLASSES)
    finish(tmp_path, VOCABULARY)
    source = Source("masks", str(masks_root), "none", pseudo_masks=str(tmp_path))
    message = r"1 masks have another size .* 'image0003': \[20, 30\] instead of \[40, 30\]"
    with pytest.raises(ValueError, match=message):
        batches(source)


def test_a_damaged_pseudo_mask_is_named_or_blanked(masks_root, tmp_path):
    pseudo = write_pseudo(tmp_path / "pseudo", range(17))
    source = Source("masks", str(masks_root), "masks", 1, 17, TURNING, pseudo_masks=pseudo)
    row = Index.open(pseudo).row(5)
    with open(tmp_path / "pseudo" / row.shard, "r+b") as stream:
        stream.seek(row.mask_offset)
        stream.write(b"\0" * row.mask_size)
    with pytest.raises(CorruptSample, match=rf"{row.key}.*shard-000001\.tar at byte"):
        batches(source, steps=1)
    (batch,) = batches(replace(source, on_corrupt="skip"), steps=1)
    place = batch.keys.index(row.key)
    assert batch.skipped == 1 and not batch.valid[place].any()
    assert (batch.pseudo_masks[place] == IGNORE).all() and (batch.masks[place] == IGNORE).all()
