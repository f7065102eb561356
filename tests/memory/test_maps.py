"""Accumulated activation maps: the strongest at each place, wherever the crops lay."""

import numpy as np
import pytest
import torch

from memseg_dist import dist
from memseg_dist.batch import Clock, Place
from memseg_dist.memory.maps import MapStore, onto_stored_image
from memseg_dist.memory.regions import Regions

SIZE, NUM_SLOTS = 3, 4


def regions() -> Regions:
    classes = np.repeat(np.arange(4), [6, 0, 3, 2])
    return Regions.of_pairs(classes, np.arange(len(classes)), 4)


def proposal(step: int, slot: int):
    draw = np.random.default_rng([step, slot])
    rows = draw.integers(0, 11, 4)
    maps = torch.from_numpy(draw.random((4, SIZE, SIZE))).float()
    return (
        regions().classes[rows],
        regions().images[rows],
        maps,
        torch.from_numpy(draw.random(4) < 0.6),
    )


def _run(num_steps: int):
    store = MapStore(regions(), SIZE)
    for step in range(num_steps):
        for slot in range(NUM_SLOTS):
            if slot % dist.size() == dist.rank():
                store.propose(*proposal(step, slot), Clock(step, slot, NUM_SLOTS))
        store.commit(Clock(step))
    counts = dist.all_gather(torch.tensor([len(store.maps)])).flatten().tolist()
    return (
        dist.all_gather_ragged(store.maps, counts),
        dist.all_gather_ragged(store.updates, counts),
        store.coverage(),
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_maps_are_maxima_at_any_number_of_ranks(world_size, process_pool):
    expected = np.zeros((11, SIZE, SIZE))
    updates = np.zeros(11)
    for step in range(2):
        for slot in range(NUM_SLOTS):
            for _, image, one, passes in zip(*proposal(step, slot)):
                if passes:
                    expected[image] = np.maximum(expected[image], np.round(255 * one.numpy()))
                    updates[image] += 1
    for maps, counts, coverage in process_pool(world_size).run(_run, 2):
        assert (maps.numpy() == expected).all() and (counts.numpy() == updates).all()
        assert coverage == pytest.approx((updates > 0).mean())


def test_the_last_epoch_writes_what_was_never_written():
    store = MapStore(regions(), SIZE)
    shut = torch.zeros(2, dtype=torch.bool)
    half = torch.full((2, SIZE, SIZE), 0.5)
    images = np.array([0, 9])
    store.propose(np.array([0, 3]), images, half, torch.tensor([True, False]), Clock(0))
    store.commit(Clock(0))
    assert store.updates.tolist() == [1, *[0] * 10]
    store.propose(np.array([0, 3]), images, 2 * half, shut, Clock(1))
    store.commit(Clock(1), even_below_gate=True)
    assert store.updates.tolist() == [1, *[0] * 8, 1, 0]
    assert int(store.maps[0].max()) == 128 and int(store.maps[9].min()) == 255


@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_lands_where_it_was_cut(flipped):
    """A crop of the right lower part, padded: its ramp continues that of the whole image."""
    size = 20
    ramp = ((torch.arange(size) + 0.5) / size).expand(size, size)
    left, top, width, height = 0.4, 0.3, 0.5, 0.6
    fine = 64
    across = left + width * (torch.arange(48) + 0.5) / 48
    crop = torch.zeros(fine, fine)
    crop[:40, :48] = across.flip(0) if flipped else across
    place = Place(left, top, width, height, flipped, 40, 48)
    found = onto_stored_image(crop[None], [place], (fine, fine), size)[0]
    centre = (torch.arange(size) + 0.5) / size
    inside = ((centre > top) & (centre < top + height))[:, None] & (
        (centre > left) & (centre < left + width)
    )
    assert ((found > 0) == inside).all()
    # the places at the crop's right edge are blended with its padding
    inner = inside & (centre < left + width - 1 / size) & (centre > left + 1 / size)
    inner &= (centre < top + height - 1 / size)[:, None]
    assert (found - ramp)[inner].abs().max() < 0.01


def test_other_sizes_are_refused_on_resume():
    state = {name: part.tensor for name, part in MapStore(regions(), SIZE).state_dict().items()}

    def read(name, start=0, stop=None):
        return state[name][start:stop]

    MapStore(regions(), SIZE).load_state_dict(read)
    with pytest.raises(ValueError, match="3 x 3 places, this run wants 5 x 5"):
        MapStore(regions(), 5).load_state_dict(read)
