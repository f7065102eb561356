"""Which pair has which row, and who holds it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from memseg_dist.memory.layouts import NO_ROW, Layout, Regions, Rings, image_id


def some_regions(num_classes=7, seed=0) -> Regions:
    draw = np.random.default_rng(seed)
    pairs = {
        (int(c), image_id(f"image-{i}")) for c, i in draw.integers(0, (num_classes, 50), (90, 2))
    }
    pairs = {(c, i) for c, i in pairs if c != 3}  # a class without images
    classes, images = np.array(sorted(pairs)).T
    return Regions.of_pairs(classes, images, num_classes)


def test_every_pair_is_found_at_its_row_and_no_other():
    regions = some_regions()
    pairs = np.stack([regions.classes, regions.images], axis=1)
    assert regions.find(pairs).tolist() == list(range(len(regions)))
    assert regions.counts[3] == 0 and regions.counts.sum() == len(regions)
    pairs = set(zip(regions.classes.tolist(), regions.images.tolist()))
    for class_id in range(7):
        for number in range(60):
            identity = image_id(f"image-{number}")
            row = regions.find(np.array([[class_id, identity]]))[0]
            assert (row != NO_ROW) == ((class_id, identity) in pairs)
    assert regions.find(np.array([[6, 2**63 - 1], [0, 0]])).tolist() == [NO_ROW, NO_ROW]


def test_nothing_is_found_where_there_are_no_rows():
    empty = Regions.of_pairs(np.empty(0, int), np.empty(0, int), 4)
    assert empty.find(np.array([[0, 1], [3, 2]])).tolist() == [NO_ROW, NO_ROW]


def test_the_capacity_keeps_images_by_their_id_alone():
    regions = some_regions()
    cut = regions.cut(5, seed=1)
    assert cut.counts.max() == 5
    assert (cut.counts == np.minimum(regions.counts, 5)).all()
    order = np.random.default_rng(0).permutation(len(regions))
    again = Regions.of_pairs(regions.classes[order], regions.images[order], 7).cut(5, seed=1)
    assert (again.images == cut.images).all()
    assert (regions.cut(5, seed=2).images != cut.images).any()
    assert regions.cut(None) is regions
    more = Regions.of_pairs(
        np.append(regions.classes, 3), np.append(regions.images, image_id("new")), 7
    )
    assert set(cut.images) <= set(more.cut(5, seed=1).images)  # other classes are untouched


def test_bad_pairs_are_named():
    with pytest.raises(ValueError, match="listed twice for class 1"):
        Regions.of_pairs(np.array([1, 1]), np.array([8, 8]), 2)
    with pytest.raises(ValueError, match=r"2 \.\. 2: class ids must lie in 0 \.\. 1"):
        Regions.of_pairs(np.array([2]), np.array([8]), 2)
    with pytest.raises(ValueError, match="capacity is 0"):
        some_regions().cut(0)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 9])
def test_classes_are_shared_by_rows(num_ranks):
    counts = [100, 1, 1, 1, 1, 96]
    layout = Layout(6, {"class": np.repeat(np.arange(6), counts)})
    bounds = layout.bounds(num_ranks)
    assert bounds[0] == 0 and bounds[-1] == 6 and len(bounds) == num_ranks + 1
    assert bounds == sorted(bounds)
    if num_ranks == 2:
        assert max(sum(counts[a:b]) for a, b in pairwise(bounds)) <= 104
    equal = Rings(12, 5).bounds(num_ranks)
    assert {b - a for a, b in pairwise(equal)} <= {12 // num_ranks, -(-12 // num_ranks)}


def test_a_saved_class_id_of_any_size_is_only_reported():
    saved = {"class": torch.tensor([0, 1, 2**53]), "position": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"another number of rows: \[2, {2**53}\]"):
        Rings(3, 1).check_saved(lambda name: saved[name])
