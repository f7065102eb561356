"""The order of samples is a pure function that loses and repeats nothing."""

import numpy as np
import pytest

from memseg_dist.data.order import BlockedOrder, permutation

SIZES = np.array([5, 3, 6, 1, 2, 9, 4])


def walk(order, steps, slots, batch):
    """(row, epoch, copy) per slot, in the order seen."""
    return [
        [draw for step in range(steps) for draw in order.slot_samples(step, slot, slots, batch)]
        for slot in range(slots)
    ]


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_every_sample_once_per_epoch(slots, group):
    order = BlockedOrder(SIZES, seed=3, group=group)
    draws = [draw for slot in walk(order, 80, slots, 2) for draw in slot]
    for epoch in range(3):
        rows = sorted(draw.row for draw in draws if draw.epoch == epoch)
        assert rows == list(range(30))


def test_repeats_come_as_often_as_they_should_each_with_its_copy_number():
    repeats = np.random.default_rng(0).integers(1, 4, 30).astype(np.uint16)
    order = BlockedOrder(SIZES, seed=3, group=2, repeats=repeats)
    assert len(order) == repeats.sum()
    draws = [draw for slot in walk(order, 100, 3, 2) for draw in slot]
    for epoch in range(2):
        seen = sorted((d.row, d.copy) for d in draws if d.epoch == epoch)
        assert seen == [(row, copy) for row in range(30) for copy in range(repeats[row])]


def test_epochs_slots_and_seeds_differ():
    order = BlockedOrder(SIZES, seed=3, group=3)
    epochs = [[order.position(epoch, place).row for place in range(30)] for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = BlockedOrder(SIZES, seed=4, group=3)
    assert [other.position(0, place).row for place in range(30)] != epochs[0]


def test_the_order_of_a_seed_never_changes():
    """Pinned: a change of these numbers changes every run that is resumed over it."""
    assert permutation(8, 1).tolist() == [6, 0, 7, 3, 5, 2, 4, 1]
    order = BlockedOrder(np.array([3, 4, 3]), seed=0, group=2)
    assert [order.position(1, place).row for place in range(10)] == [6, 8, 7, 3, 5, 4, 9, 0, 1, 2]


def test_a_slot_touches_only_its_own_shards():
    order = BlockedOrder(np.full(64, 100), seed=0, group=4)
    for slot in range(4):
        rows = [d.row for step in range(200) for d in order.slot_samples(step, slot, 4, 8)]
        assert len({row // 100 for row in rows}) == 16


def test_shuffling_is_not_biased():
    """Each of 40 rows is first about equally often over 4000 epochs (5 standard deviations)."""
    order = BlockedOrder(np.full(8, 5), seed=1, group=3)
    firsts = np.bincount([order.position(epoch, 0).row for epoch in range(4000)], minlength=40)
    assert abs(firsts - 100).max() < 50


def test_any_step_costs_the_same_and_equals_the_walk():
    order = BlockedOrder(SIZES, seed=3, group=3)
    walked = walk(order, 50, 2, 3)
    fresh = BlockedOrder(SIZES, seed=3, group=3)
    assert fresh.slot_samples(49, 1, 2, 3) == walked[1][-3:]
    assert fresh.slot_samples(10**9, 0, 2, 3) == order.slot_samples(10**9, 0, 2, 3)


def test_what_cannot_be_ordered_is_named():
    with pytest.raises(ValueError, match="nothing to order: 0 shards with 0 samples"):
        BlockedOrder(np.array([], dtype=int), seed=0)
    with pytest.raises(ValueError, match=r"30 numbers of at least 1.*the smallest 0"):
        BlockedOrder(SIZES, seed=0, repeats=np.zeros(30, int))
