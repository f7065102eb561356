"""Promise 1 of the data: the same batches on any number of workers, processes and restarts."""

import dataclasses
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.made import NUM_CLASSES, SPACE, VOCABULARY, blocks, encoded, sample, write

from memseg_dist.batch import IGNORE
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.decode import CorruptSample, encode_mask
from memseg_dist.data.files import default_cache
from memseg_dist.data.index import Index
from memseg_dist.data.loader import EvalDataset, Source, TrainLoader, slots_of
from memseg_dist.data.pairs import steps_per_epoch
from memseg_dist.data.vocabulary import Category, LabelSpace
from memseg_dist.tools.shards import Sample, finish, write_shard

SMALL = AugmentConfig(resize=(64, 48), crop=32)
STEPS = 7


@pytest.fixture
def sources(masks_root, labels_root):
    return (
        Source("masks", str(masks_root), "masks", 3, 2, SMALL, group=2),
        Source("labels", str(labels_root), "labels", 2, 3, SMALL, group=2, repeat_threshold=0.5),
    )


def run(sources, world_size=1, num_processes=0, spans=((0, STEPS),)):
    """(step, slot) -> batch, over all ranks, checking the plan of each rank on the way."""
    made = {}
    for rank in range(world_size):
        loader = TrainLoader(
            sources, SPACE, seed=5, num_processes=num_processes, rank=rank, world_size=world_size
        )
        for span in spans:
            for step, micro_batches in zip(range(*span), loader.steps(*span), strict=True):
                assert len(micro_batches) == -(-loader.num_slots // world_size)
                for batch, clock in micro_batches:
                    assert (clock.step, clock.num_slots, clock.seed) == (step, 5, 5)
                    if clock.idle:
                        assert batch is made[step, clock.slot]
                    else:
                        assert (step, clock.slot) not in made
                        made[step, clock.slot] = batch
    return made


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for place, batch in ours.items():
        other = theirs[place]
        for name in ("labels", "source", "supervision", "keys", "skipped", "crop_boxes"):
            assert getattr(batch, name) == getattr(other, name), (place, name)
        for name in ("images", "valid", "masks", "saliency"):
            ours_tensor, other_tensor = getattr(batch, name), getattr(other, name)
            assert (ours_tensor is None) == (other_tensor is None)
            assert ours_tensor is None or torch.equal(ours_tensor, other_tensor), (place, name)


@pytest.mark.parametrize("num_processes", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_batches_do_not_depend_on_workers_and_processes(sources, world_size, num_processes):
    expected = run(sources)
    assert sorted(expected) == [(step, slot) for step in range(STEPS) for slot in range(5)]
    assert_same(run(sources, world_size, num_processes), expected)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_resuming_equals_running_on(sources, num_processes):
    expected = run(sources)
    assert_same(run(sources, 2, num_processes, spans=((0, 3), (3, 4), (4, STEPS))), expected)
    later = {place: batch for place, batch in expected.items() if place[0] >= 4}
    assert_same(run(sources, 3, 0, spans=((4, STEPS),)), later)


def test_an_iterator_that_is_left_does_not_disturb_the_next(sources):
    expected = run(sources)
    loader = TrainLoader(sources, SPACE, seed=5, num_processes=2)
    for micro_batches in loader.steps(0, 50):
        assert micro_batches[0][0].keys == expected[0, 0].keys
        break
    made = {(c.step, c.slot): batch for step in loader.steps(2, 5) for batch, c in step}
    assert_same(made, {place: batch for place, batch in expected.items() if 2 <= place[0] < 5})


def test_every_sample_once_per_epoch_of_its_source(masks_root, labels_root):
    sources = (
        Source("masks", str(masks_root), "masks", 3, 2, SMALL, group=2),
        Source("labels", str(labels_root), "labels", 2, 1, SMALL, group=2),
    )
    made = run(sources, world_size=2, spans=((0, 7),))
    keys = [made[step, slot].keys for slot in (3, 4) for step in range(7)]
    assert sorted(key for batch in keys for key in batch) == [sample(i).key for i in range(14)]
    # 17 samples in 3 slots: segments of 5, 6 and 6. Epoch 0 is what each slot sees first.
    first_epoch = []
    for slot, length in enumerate((5, 6, 6)):
        seen = [key for step in range(7) for key in made[step, slot].keys]
        first_epoch += seen[:length]
        assert len({*seen[length : 2 * length]}) == length
    assert sorted(first_epoch) == [sample(i).key for i in range(17)]


def test_the_global_generators_are_left_alone(sources):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for num_processes in (0, 2):
        loader = TrainLoader(sources, SPACE, seed=5, num_processes=num_processes)
        assert len([*loader.steps(0, 2)]) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_loader_processes_start_beside_running_threads(sources):
    """They are not forked from this process, whose locks may be held by any thread."""
    stop = threading.Event()
    lock = threading.Lock()
    thread = threading.Thread(target=lambda: lock.acquire() and stop.wait())
    thread.start()
    try:
        loader = TrainLoader(sources, SPACE, seed=5, num_processes=1)
        assert len([*loader.steps(0, 1)]) == 1
    finally:
        stop.set()
        thread.join()


def test_slots_of_covers_each_slot_once_and_evenly():
    for num_slots in range(1, 12):
        for world_size in range(1, num_slots + 1):
            plans = [slots_of(rank, world_size, num_slots) for rank in range(world_size)]
            assert {len(plan) for plan in plans} == {-(-num_slots // world_size)}
            own = [slot for plan in plans for slot, idle in plan if not idle]
            assert sorted(own) == list(range(num_slots))
            for first in range(num_slots):  # whatever source has the slots from there on
                counts = [sum(slot >= first for slot, idle in p if not idle) for p in plans]
                assert max(counts) - min(counts) <= 1
            assert all(not plan[0].idle and p.slot == plan[0].slot for plan in plans
                       for p in plan if p.idle)  # fmt: skip


def test_more_workers_than_slots(sources):
    with pytest.raises(ValueError, match=r"6 workers for 5 slots.*at most 5 workers"):
        TrainLoader(sources, SPACE, seed=0, rank=0, world_size=6)


def one_batch(source, space=SPACE, **settings):
    loader = TrainLoader([source], space, seed=0, **settings)
    ((batch, _),) = next(loader.steps(0, 1))
    return batch


def whole(name, root, supervision, **settings):
    """A source whose only batch holds all samples, unscaled and uncropped."""
    plain = AugmentConfig((40, 30), (1.0, 1.0), 40, 0.0, photometric=False, category_max_ratio=1.0)
    batch = len(Index.open(root))
    return Source(name, str(root), supervision, 1, batch, plain, **settings)


def number_of(key):
    return int(key.removeprefix("image"))


def expected_mask(key):
    mask = torch.full((40, 40), IGNORE)
    mask[:30] = torch.from_numpy(blocks(number_of(key)).astype(np.int64))
    return torch.where(mask == 65535, IGNORE, mask)


def test_masks_and_labels_are_label_space_ids(masks_root, labels_root):
    first = (*VOCABULARY.categories[4:], Category("z", "zebra"))
    other = dataclasses.replace(VOCABULARY, categories=first)
    merge = {"masks": {"n1": Category("n0", "class 0")}}
    space = LabelSpace.union({"other": other, "masks": VOCABULARY}, merge)
    to_union = torch.tensor([3, 3, 4, 5, 0, 1, IGNORE])
    assert space.to_union["masks"].tolist() == to_union[:-1].tolist()
    batch = one_batch(whole("masks", masks_root, "masks"), space)
    assert (batch.masks.dtype, batch.to("cpu").masks.dtype) == (torch.int32, torch.int64)
    assert batch.images.dtype == torch.uint8
    for key, mask, valid, labels in zip(
        batch.keys, batch.masks, batch.valid, batch.labels, strict=True
    ):
        assert torch.equal(mask, to_union[expected_mask(key)])
        assert valid[:30].all()
        assert not valid[30:].any()
        present = {*mask[mask != IGNORE].tolist(), int(to_union[number_of(key) % NUM_CLASSES])}
        assert labels == tuple(sorted(present))


def test_excluded_classes_become_unknown(masks_root):
    source = whole("masks", masks_root, "masks", exclude=("n2", "n5"))
    batch = one_batch(source)
    for key, mask, labels in zip(batch.keys, batch.masks, batch.labels, strict=True):
        expected = expected_mask(key)
        expected[(expected == 2) | (expected == 5)] = IGNORE
        assert torch.equal(mask, expected)
        assert not {2, 5} & {*labels}
    with pytest.raises(ValueError, match=r"'masks', exclude: .*no class has uid 'n9'"):
        one_batch(replace(source, exclude=("n9",)))


def test_classes_change_places_in_flipped_crops(masks_root):
    """With masks, labels of the index and labels of the crop; what is not flipped stays."""
    plain = whole("masks", masks_root, "masks")
    plain = replace(plain, augment=replace(plain.augment, flip=0.5))
    pairs = (("n1", "n4"), ("n0", "n2"))
    turn = torch.tensor([2, 4, 0, 3, 1, 5, IGNORE])  # the last is IGNORE itself
    for source in (
        plain,
        replace(plain, supervision="labels"),
        replace(plain, supervision="labels", labels_from="crop", hide_mask=True),
    ):
        before, after = one_batch(source), one_batch(replace(source, swap_on_flip=pairs))
        assert torch.equal(before.images, after.images) and before.keys == after.keys
        flips = [box.flipped for box in after.crop_boxes]
        assert {*flips} == {True, False}
        for number, is_flipped in enumerate(flips):
            labels = before.labels[number]
            swapped = tuple(sorted(turn[list(labels)].tolist()))
            assert after.labels[number] == (swapped if is_flipped else labels)
            if before.masks is not None:
                mask = before.masks[number]
                assert torch.equal(after.masks[number], turn[mask] if is_flipped else mask)
        assert before.labels != after.labels


def test_pairs_to_swap_are_checked(masks_root):
    source = whole("masks", masks_root, "masks", swap_on_flip=(("n1", "n9"),))
    message = r"source 'masks', swap_on_flip: .*no class has uid 'n9'"
    with pytest.raises(ValueError, match=message):
        TrainLoader([source], SPACE, seed=0)
    source = replace(source, swap_on_flip=(("n1", "n2"),), exclude=("n2",))
    message = r"'masks', swap_on_flip: 'n2' is no class of its vocabulary, or is excluded"
    with pytest.raises(ValueError, match=message):
        TrainLoader([source], SPACE, seed=0)
    with pytest.raises(ValueError, match=r"'masks': swap_on_flip is .* must be pairs of two diff"):
        replace(source, swap_on_flip=(("n1", "n2"), ("n2", "n3")))


def test_turned_crops_have_no_boxes(masks_root):
    source = whole("masks", masks_root, "masks")
    assert len(one_batch(source).crop_boxes) == 17
    turning = replace(source, augment=replace(source.augment, rotate=20.0))
    batch = one_batch(turning)
    assert batch.crop_boxes == ()
    assert (batch.masks[~batch.valid] == IGNORE).all()


def test_labels_of_the_image_and_of_the_crop(masks_root):
    index = Index.open(masks_root)
    image_labels = {index.key(i): index.labels(i) for i in range(len(index))}
    batch = one_batch(whole("masks", masks_root, "labels"))
    assert batch.masks is None
    assert batch.labels == tuple(image_labels[key] for key in batch.keys)
    batch = one_batch(whole("masks", masks_root, "labels", labels_from="crop"))
    assert batch.masks is None
    for key, labels in zip(batch.keys, batch.labels, strict=True):
        seen = expected_mask(key)[::2, ::2].unique()
        assert labels == tuple(seen[seen != IGNORE].tolist())
    batch = one_batch(whole("masks", masks_root, "none"))
    assert (batch.masks, {*batch.labels}) == (None, {()})


def test_a_hidden_mask_does_not_choose_the_crop(masks_root, labels_root):
    narrow = AugmentConfig((40, 30), crop=16, category_max_ratio=0.5)
    seen = Source("masks", str(masks_root), "labels", 1, 17, narrow)
    hidden = one_batch(replace(seen, hide_mask=True))
    free = one_batch(replace(seen, augment=replace(narrow, category_max_ratio=1.0)))
    assert torch.equal(hidden.images, free.images)
    assert not torch.equal(hidden.images, one_batch(seen).images)
    labelled = one_batch(replace(seen, hide_mask=True, labels_from="crop"))
    assert torch.equal(labelled.images, free.images)
    assert labelled.labels != free.labels


def test_repeats_in_an_epoch_are_augmented_each_in_its_own_way(tmp_path):
    samples = [Sample(f"a{i}", encoded(i), "jpg", (int(i > 0),)) for i in range(9)]
    write_shard(tmp_path, 0, samples, num_classes=NUM_CLASSES)
    finish(tmp_path, VOCABULARY)
    source = Source("labels", str(tmp_path), "labels", 1, 11, SMALL, repeat_threshold=1.0)
    batch = one_batch(source)
    places = [place for place, key in enumerate(batch.keys) if key == "a0"]
    assert len(places) == 3  # class 0 is in 1 of 9 images: sqrt(1 / (1/9)) = 3
    assert len({batch.images[place].numpy().tobytes() for place in places}) == 3
    cache = default_cache()
    two = replace(source, batch_per_slot=2)
    assert steps_per_epoch([two], SPACE, cache) == 6  # of 11 samples
    assert steps_per_epoch([replace(two, repeat_threshold=None)], SPACE, cache) == 5


def test_what_is_excluded_is_not_drawn_more_often(tmp_path):
    write(tmp_path / "data", (14,), with_masks=False)
    source = Source("labels", str(tmp_path / "data"), "labels", repeat_threshold=1.0)
    everything = replace(source, exclude=VOCABULARY.uids)
    orders = [TrainLoader([each], SPACE, seed=0)._requests._orders for each in (source, everything)]
    assert [len(order) > 14 for (order,) in orders] == [True, False]


def test_the_group_of_each_own_slot_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("memseg_dist.data.order._CACHED_ROWS", 0)
    write(tmp_path / "data", (4, 4, 4, 4), with_masks=False)
    source = Source("labels", str(tmp_path / "data"), "labels", 4, 1, group=1)
    requests = TrainLoader([source], SPACE, seed=0, world_size=2)._requests
    requests.span = range(4)  # an epoch: two of four slots, each with a shard of its own
    assert len([*requests]) == 8
    assert requests._orders[0]._group.cache_info().misses == 2


def overwrite(path, offset, content):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def test_a_corrupt_sample_is_named_or_blanked(tmp_path):
    index = write(tmp_path, (3,))
    row = index.row(1)
    overwrite(tmp_path / row.shard, row.image_offset + 300, b"\0" * (row.image_size - 300))
    overwrite(tmp_path / row.shard, row.image_offset, b"\0" * 300)
    source = whole("masks", tmp_path, "masks")
    message = rf"'image0001' of shard .*shard-000000.tar at byte {row.image_offset}: not a readable"
    for num_processes in (0, 1):
        with pytest.raises(CorruptSample, match=message):
            one_batch(source, num_processes=num_processes)
    batch = one_batch(replace(source, on_corrupt="skip"))
    place = batch.keys.index("image0001")
    assert batch.skipped == 1
    assert batch.labels[place] == ()
    assert not batch.valid[place].any()
    assert not batch.images[place].any()
    assert (batch.masks[place] == IGNORE).all()
    assert batch.valid.any(2).any(1).sum() == 2
    wide = replace(source, on_corrupt="skip", augment=replace(source.augment, crop=(16, 40)))
    batch = one_batch(wide)
    assert batch.skipped == 1 and batch.images.shape[-2:] == batch.masks.shape[-2:] == (16, 40)


def test_a_truncated_jpeg_is_named(tmp_path):
    content = encoded(0, 200, 200)
    write_shard(tmp_path, 0, [Sample("a", content[:-800], "jpg")], num_classes=NUM_CLASSES)
    finish(tmp_path, VOCABULARY)
    with pytest.raises(CorruptSample, match=r"'a' of shard .*JPEG data is damaged or cut short"):
        one_batch(whole("labels", tmp_path, "labels"))


def test_a_shard_changed_behind_its_index_is_named(tmp_path):
    index = write(tmp_path / "a", (2,))
    row = index.row(0)
    wrong_size = encode_mask(blocks(0, 20, 30)).ljust(row.mask_size, b"\0")
    assert len(wrong_size) == row.mask_size
    overwrite(tmp_path / "a" / row.shard, row.mask_offset, wrong_size)
    with pytest.raises(
        CorruptSample, match="the mask is 20 x 30 pixels but the index says 40 x 30"
    ):
        one_batch(whole("masks", tmp_path / "a", "masks"))


def test_a_mask_value_outside_the_vocabulary_is_named(tmp_path):
    index = write(tmp_path, (1,))
    row = index.row(0)
    outside = encode_mask(np.full((30, 40), NUM_CLASSES, np.uint16))
    overwrite(tmp_path / row.shard, row.mask_offset, outside.ljust(row.mask_size, b"\0"))
    with pytest.raises(CorruptSample, match="mask value 6 outside the vocabulary of 6 classes"):
        one_batch(whole("masks", tmp_path, "masks"))


def test_missing_and_truncated_shards_are_found_before_training(tmp_path):
    write(tmp_path, (2, 2))
    source = whole("masks", tmp_path, "masks")
    loader = TrainLoader([source], SPACE, seed=0)
    path = tmp_path / "shard-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:3000])
    with pytest.raises(ValueError, match=r"shard-000001\.tar is cut short: 3000 bytes"):
        TrainLoader([source], SPACE, seed=0)
    with pytest.raises(CorruptSample, match=r"the shard is cut short, .* bytes are there"):
        next(loader.steps(0, 1))
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing although"):
        TrainLoader([source], SPACE, seed=0)


def test_sources_that_cannot_work_are_refused(masks_root, labels_root, tmp_path):
    source = Source("labels", str(labels_root), "labels", augment=SMALL)
    for changes, message in (
        ({"supervision": "masks"}, "14 of 14 samples have no mask, which supervision 'masks'"),
        ({"labels_from": "crop"}, "14 of 14 samples have no mask.*labels_from 'crop'"),
        ({"name": "other"}, "source 'other' is not in the label space; known are"),
        ({"slots": 15}, "14 samples cannot fill 15 slots"),
        ({"path": str(tmp_path)}, r"no index\.parquet; .*memseg data index"),
        ({"repeat_threshold": 0.0}, "repeat_threshold is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainLoader([replace(source, **changes)], SPACE, seed=0)
    with pytest.raises(ValueError, match="each with its own name"):
        TrainLoader([source, source], SPACE, seed=0)
    small = LabelSpace.union(
        {"labels": dataclasses.replace(VOCABULARY, categories=VOCABULARY.categories[:3])}
    )
    with pytest.raises(ValueError, match="label 5 is outside the vocabulary of 3 classes"):
        TrainLoader([source], small, seed=0)
    for changes, message in (
        ({"slots": -1}, "slots is -1"),
        ({"supervision": "boxes"}, "supervision is 'boxes'; it must be one of"),
        ({"supervision": "masks", "hide_mask": True}, "'masks' with hide_mask"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(source, **changes)


def test_an_empty_source_is_refused(tmp_path):
    import pyarrow.parquet as pq

    write(tmp_path, (1,))
    table = pq.read_table(tmp_path / "index.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "index.parquet")
    with pytest.raises(ValueError, match=r"source 'masks' at .* has no samples; check the path"):
        TrainLoader([Source("masks", str(tmp_path), "masks")], SPACE, seed=0)


def test_a_source_is_json():
    source = Source("a", "b", "labels", exclude=("x",), swap_on_flip=(("y", "z"),))
    value = json.loads(json.dumps(dataclasses.asdict(source)))
    augment = AugmentConfig(**value.pop("augment"))
    assert Source(**value, augment=augment) == source


def test_evaluation_items(masks_root):
    dataset = EvalDataset(masks_root, SPACE, "masks", resize=(2048, 60))
    assert len(dataset) == 17
    item = dataset[2]
    assert item.key == "image0002"
    assert item.image.shape == (3, 60, 80)
    assert item.truth.dtype == torch.int64
    assert torch.equal(item.truth, expected_mask(item.key)[:30])
    square = EvalDataset(masks_root, SPACE, "masks", resize=(60, 60), keep_ratio=False)
    assert square[2].image.shape == (3, 60, 60) and torch.equal(square[2].truth, item.truth)
    stored = EvalDataset(masks_root, SPACE, "masks", resize=None)
    assert stored[2].image.shape == (3, 30, 40)
    assert [item.key for item in stored] == [f"image{number:04d}" for number in range(17)]


def test_evaluation_needs_masks(labels_root):
    with pytest.raises(ValueError, match="14 of 14 samples have no mask"):
        EvalDataset(labels_root, SPACE, "labels")
