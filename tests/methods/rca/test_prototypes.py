"""Prototypes of a memory that is spread over ranks, some of which hold nothing."""

import numpy as np
import pytest
import torch

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.memory.layouts import Regions
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Momentum
from memseg_dist.methods.rca.prototypes import Prototypes, find_prototypes

DIM = 4
ROWS_PER_CLASS = [40, 0, 3, 25, 1]
"""Class 1 has no row, classes 2 and 4 fewer than K."""


def bank() -> ShardedRows:
    classes = np.repeat(np.arange(5), ROWS_PER_CLASS)
    images = np.arange(len(classes))
    memory = ShardedRows(Regions.of_pairs(classes, images, 5), Momentum(), DIM)
    if dist.rank() == 0:
        draw = np.random.default_rng(0)
        centres = draw.normal(size=(5, 4, DIM)) * 8
        vectors = centres[classes, images % 4] + draw.normal(size=(len(classes), DIM)) * 0.1
        gate = torch.from_numpy(images != 5)  # one row stays unset
        ids = np.stack([classes, images], axis=1)
        memory.propose(ids, torch.from_numpy(vectors).float(), Clock(0), weight=gate)
    memory.commit(Clock(0))
    return memory


def _prototypes(per_class):
    return find_prototypes(bank(), per_class, seed=3, num_starts=3)


@pytest.mark.parametrize("per_class", [1, 4, None])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_prototypes_are_the_same_on_any_number_of_ranks(world_size, per_class, process_pool):
    alone = _prototypes(per_class)
    for found in process_pool(world_size).run(_prototypes, per_class):
        assert all(torch.equal(part, wanted) for part, wanted in zip(found, alone))


def test_every_set_row_is_in_one_prototype_of_its_class():
    memory = bank()
    rows, sizes = memory.set_rows()
    assert sizes == [39, 0, 3, 25, 1]
    one = find_prototypes(memory, 1, seed=0)
    assert one.classes.tolist() == [0, 2, 3, 4] and one.sizes.tolist() == [39, 3, 25, 1]
    torch.testing.assert_close(one.vectors[0], rows[:39].mean(dim=0))
    four = find_prototypes(memory, 4, seed=0, num_starts=3)
    assert torch.bincount(four.classes, minlength=5).tolist() == [4, 0, 3, 4, 1]
    assert torch.bincount(four.classes, weights=four.sizes.double()).tolist() == [39, 0, 3, 25, 1]
    assert Prototypes(*four).cluster_sizes()[:4].tolist() == sorted(
        four.sizes[:4].tolist(), reverse=True
    )
    every = find_prototypes(memory, None, seed=0)
    assert torch.equal(every.vectors, rows) and every.sizes.tolist() == [1] * len(rows)


def test_an_empty_memory_has_none():
    regions = Regions.of_pairs(np.zeros(3, int), np.arange(3), 2)
    memory = ShardedRows(regions, Momentum(), DIM)
    assert len(find_prototypes(memory, 10, seed=0).vectors) == 0
