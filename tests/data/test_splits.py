"""A source of a split is a data set that has only these samples."""

import pickle
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data.made import NUM_CLASSES, SPACE, VOCABULARY, sample

from memseg_dist.data import columns
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source, TrainLoader
from memseg_dist.data.order import repeat_factors
from memseg_dist.data.pairs import image_counts, labelled_regions, steps_per_epoch
from memseg_dist.data.source import open_index
from memseg_dist.data.vocabulary import Category, LabelSpace
from memseg_dist.tools.shards import finish, write_shard

SMALL = AugmentConfig(resize=(64, 48), crop=32)
NUMBERS = (16, 2, 8, 7, 0, 13, 4)  # of the shards of 5, 3, 6, 1 and 2 samples, all but the fourth
KEYS = [sample(number).key for number in NUMBERS]


@pytest.fixture
def root(masks_root, tmp_path):
    """`masks_root` under a name of its own, so that splits can be written beside its shards."""
    for path in masks_root.iterdir():
        (tmp_path / "masks").mkdir(exist_ok=True)
        (tmp_path / "masks" / path.name).symlink_to(path)
    return tmp_path / "masks"


@pytest.fixture
def alone(tmp_path):
    """A data set that has only these samples, in the same shards without the empty one."""
    start, number = 0, 0
    for size in (5, 3, 6, 1, 2):
        members = [sample(n) for n in range(start, start + size) if n in NUMBERS]
        start += size
        if members:
            write_shard(tmp_path / "alone", number, members, num_classes=NUM_CLASSES)
            number += 1
    finish(tmp_path / "alone", VOCABULARY)
    return tmp_path / "alone"


def write_split(root, name="few", keys=KEYS):
    path = root / "splits" / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(keys) + "\n\n", encoding="utf-8")
    return path


def batches(source, world_size=1, num_processes=0, steps=9):
    made = {}
    for rank in range(world_size):
        loader = TrainLoader([source], SPACE, seed=3, rank=rank, world_size=world_size,
                             num_processes=num_processes)  # fmt: skip
        for micro_batches in loader.steps(0, steps):
            made |= {(c.step, c.slot): batch for batch, c in micro_batches if not c.idle}
    return made


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for place, batch in ours.items():
        assert (batch.keys, batch.labels) == (theirs[place].keys, theirs[place].labels)
        for name in ("images", "valid", "masks"):
            assert torch.equal(getattr(batch, name), getattr(theirs[place], name))


def test_a_part_is_the_index_of_a_data_set_with_these_samples(root, alone, monkeypatch):
    monkeypatch.setattr(columns, "_BATCH_ROWS", 2)  # some batches have none of them
    whole = Index.open(root)
    for part in (
        whole.only(KEYS),
        pickle.loads(pickle.dumps(whole.only(KEYS))),
        whole.only([*KEYS, sample(5).key]).only(KEYS[::-1]),
    ):
        other = Index.open(alone)
        assert len(part) == len(other) == len(KEYS)
        assert [*part.all_keys()] == [*other.all_keys()] == [part.key(i) for i in range(len(part))]
        assert part.shard_sizes.tolist() == other.shard_sizes.tolist() == [3, 1, 2, 1]
        assert part.shard_starts.tolist() == other.shard_starts.tolist()
        names = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "shard-000004.tar"]
        assert part.shard_names == names
        assert (part.num_masks, part.max_label) == (other.num_masks, other.max_label)
        assert np.array_equal(part.labels_offsets, other.labels_offsets)
        assert np.array_equal(part.labels_values, other.labels_values)
        assert np.array_equal(part.numbers("width"), other.numbers("width"))
        pixels = part.class_pixel_counts(NUM_CLASSES)
        assert pixels.tolist() == other.class_pixel_counts(NUM_CLASSES).tolist() and any(pixels)
        counts = part.class_image_counts(NUM_CLASSES)
        assert counts.tolist() == other.class_image_counts(NUM_CLASSES).tolist()
        labels = np.arange(NUM_CLASSES)
        ours, theirs = (repeat_factors(each, labels, 0.5) for each in (part, other))
        assert ours.tolist() == theirs.tolist()
        assert part.vocabulary == other.vocabulary and str(part) == str(other)
        for number in range(len(part)):
            ours, theirs = part.row(number), other.row(number)
            assert (ours.key, ours.labels, ours.mask_size) == (
                theirs.key, theirs.labels, theirs.mask_size,
            )  # fmt: skip
            assert part.labels(number) == ours.labels
        part.check_shards()
    with pytest.raises(IndexError, match="row 7 of 7"):
        part.row(7)


def test_a_part_counts_its_own_masks_and_labels(tmp_path):
    write_shard(tmp_path, 0, [sample(0), sample(5, with_mask=False)], num_classes=NUM_CLASSES)
    index = finish(tmp_path, VOCABULARY)
    assert (index.num_masks, index.max_label) == (1, 5)
    part = index.only([sample(0).key])
    assert (part.num_masks, part.max_label) == (1, part.labels(0)[-1])
    other = index.only([sample(5).key])
    assert (other.num_masks, other.max_label, other.labels(0)) == (0, 5, (5,))


def test_an_index_that_changes_under_a_part_is_named(root):
    whole = Index.open(root)
    table = pq.read_table(root / "index.parquet")
    (root / "index.parquet").unlink()  # a link
    pq.write_table(table.slice(2), root / "index.parquet")
    with pytest.raises(ValueError, match=r"index\.parquet has changed while it was read"):
        whole.only([whole.key(0), whole.key(2)])


def test_check_shards_looks_at_the_parts_own(root):
    part, fourth = Index.open(root).only(KEYS), Index.open(root).only([sample(14).key])
    (root / "shard-000003.tar").unlink()
    part.check_shards()
    with pytest.raises(ValueError, match=r"shard-000003\.tar is missing"):
        fourth.check_shards()


def test_rows_of_keys_in_any_order(root):
    keys = ["image0016", "nobody", "image0002", "image0016"]
    assert Index.open(root).rows_of(keys).tolist() == [16, -1, 2, 16]
    assert Index.open(root).only(KEYS).rows_of(keys).tolist() == [6, -1, 1, 6]
    assert Index.open(root).rows_of([]).tolist() == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "names no keys"),
        (["image0001", "image0002", "image0001"], "1 keys are given more than once: 'image0001';"),
        (
            ["x1", "image0001", "x2", "x3", "x4"],
            r"4 of its 5 keys are not in the shards at .*: 'x1', 'x2', 'x3', \.\.\.;",
        ),
    ],
)
def test_keys_that_make_no_part(root, keys, message):
    with pytest.raises(ValueError, match=message):
        Index.open(root).only(keys)
    write_split(root, keys=keys)
    source = Source("masks", str(root), "masks", split="few")
    with pytest.raises(ValueError, match=rf"source 'masks', split .*splits/few\.txt: .*{message}"):
        TrainLoader([source], SPACE, seed=0)


def test_batches_are_those_of_a_data_set_with_these_samples(root, alone):
    write_split(root)
    source = Source("masks", str(root), "masks", 2, 2, SMALL, group=2, split="few")
    other = replace(source, path=str(alone), split=None)
    expected = batches(other)
    assert_same(batches(source), expected)
    assert_same(batches(source, world_size=2), expected)
    assert_same(batches(source, num_processes=1), expected)
    seen = [key for slot in (0, 1) for step in range(9) for key in expected[step, slot].keys]
    assert {*seen} == {*KEYS}
    one_slot = batches(replace(source, slots=1, batch_per_slot=7), steps=4)
    assert all(sorted(batch.keys) == sorted(KEYS) for batch in one_slot.values())
    assert len({batch.keys for batch in one_slot.values()}) > 1  # each epoch another order
    with pytest.raises(ValueError, match="7 samples cannot fill 8 slots"):
        TrainLoader([replace(source, slots=8)], SPACE, seed=0)


def test_counts_regions_and_epochs_are_the_splits(root, alone, cache):
    write_split(root)
    part = Source("masks", str(root), "labels", 1, 2, split="few")
    other = replace(part, path=str(alone), split=None)
    nothing = Source("labels", str(root), "none", 1, 2)
    assert (
        steps_per_epoch([part], SPACE, cache) == 4
        and steps_per_epoch([part, nothing], SPACE, cache) == 9
    )
    counts = image_counts([other], SPACE, cache)
    assert image_counts([part], SPACE, cache).tolist() == counts.tolist()
    assert counts.sum() < image_counts([replace(part, split=None)], SPACE, cache).sum()
    ours, theirs = (labelled_regions([each], SPACE, cache) for each in (part, other))
    assert (
        len(ours) == len(theirs) < len(labelled_regions([replace(part, split=None)], SPACE, cache))
    )
    # what has no labels is neither counted nor remembered, though its shards have labels
    assert image_counts([part, nothing], SPACE, cache).tolist() == counts.tolist()
    assert len(labelled_regions([part, nothing], SPACE, cache)) == len(ours)


def test_an_image_counts_once_for_names_that_are_one_class(root, cache):
    same = {f"n{number}": Category("n0", "class 0") for number in range(NUM_CLASSES)}
    space = LabelSpace.union({"masks": VOCABULARY}, {"masks": same})
    source = Source("masks", str(root), "masks")
    index = Index.open(root, cache)
    assert (
        image_counts([source], space, cache).tolist() == [len(index)] < [len(index.labels_values)]
    )


def test_a_split_by_path_and_at_a_url(root, tmp_path):
    path = write_split(root)
    source = Source("masks", str(root), "masks", split="few")
    expected = [*open_index(source, tmp_path / "cache").all_keys()]
    fsspec.filesystem("memory").pipe_file("/lists/few.txt", path.read_bytes())
    path.rename(tmp_path / "list.txt")
    for split in (str(tmp_path / "list.txt"), "memory://lists/few.txt"):
        found = open_index(replace(source, split=split), tmp_path / "cache")
        assert [*found.all_keys()] == expected


def test_a_split_that_is_not_there(root):
    source = Source("masks", str(root), "masks", split="1_16")
    message = r"source 'masks': there is no split .*masks/splits/1_16\.txt; with the shards are "
    with pytest.raises(ValueError, match=message + r"none; make one with `memseg data split .*`"):
        TrainLoader([source], SPACE, seed=0)
    write_split(root, "few")
    write_split(root, "b")
    with pytest.raises(ValueError, match=message + r"\['b', 'few'\]"):
        TrainLoader([source], SPACE, seed=0)
    write_split(root, "1_16").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"1_16\.txt is no UTF-8 text"):
        TrainLoader([source], SPACE, seed=0)
    with pytest.raises(ValueError, match="source 'masks': split is ''"):
        replace(source, split="")


def test_without_supervision_no_mask_is_looked_at(root, monkeypatch):
    """Neither read, nor for the crop, nor for the order; shards without masks give the same."""
    narrow = AugmentConfig((40, 30), crop=16, category_max_ratio=0.5)
    source = Source("masks", str(root), "none", 1, 17, narrow)
    free = batches(replace(source, augment=replace(narrow, category_max_ratio=1.0)), steps=1)
    seen = batches(replace(source, supervision="labels"), steps=1)[0, 0]
    monkeypatch.setattr("memseg_dist.data.reader.decode_mask", None)
    for each in (source, replace(source, labels_from="crop")):
        batch = batches(each, steps=1)[0, 0]
        assert torch.equal(batch.images, free[0, 0].images)
        assert not torch.equal(batch.images, seen.images)
        assert (batch.masks, {*batch.labels}) == (None, {()})
    with pytest.raises(ValueError, match=r"'none' with repeat_threshold 0\.5, which balances"):
        replace(source, repeat_threshold=0.5)


def test_crops_from_labels_need_masks_only_where_labels_are_used(labels_root):
    source = Source("labels", str(labels_root), "none", augment=SMALL, labels_from="crop")
    TrainLoader([source], SPACE, seed=0)
    with pytest.raises(ValueError, match="14 of 14 samples have no mask"):
        TrainLoader([replace(source, supervision="labels")], SPACE, seed=0)


def test_the_whole_set_and_a_split_of_it_are_two_sources(root):
    """92 labelled images and all of them without labels: other crops, since orders differ."""
    write_split(root)
    few = Source("masks", str(root), "masks", 1, 2, SMALL, split="few")
    all_images = Source("labels", str(root), "none", 1, 3, SMALL)
    loader = TrainLoader([few, all_images], SPACE, seed=0)
    keys = {0: [], 1: []}
    for micro_batches in loader.steps(0, 6):
        for batch, clock in micro_batches:
            keys[clock.slot] += batch.keys
            assert (batch.masks is None) == (clock.slot == 1)
    assert {*keys[0]} == {*KEYS} and len({*keys[1]}) == 17
