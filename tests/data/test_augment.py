"""The paired augmentation: pairing, sizes, padding, and that it is a pure function of its seed."""

import colorsys
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from memseg_dist.data.augment import (
    AugmentConfig,
    _shift_colours,
    augment,
    distort_colours,
    fitted_size,
    nearest_indices,
    resized_size,
)

PLAIN = AugmentConfig(resize=(96, 64), crop=48, flip=0.5, photometric=False)


def checkerboard(height=60, width=80, cell=20):
    """An image whose red channel is 10 x the class of its mask."""
    rows, columns = torch.arange(height) // cell, torch.arange(width) // cell
    mask = (rows[:, None] * 4 + columns[None]).to(torch.int32)
    return (mask * 10).to(torch.uint8).expand(3, -1, -1).contiguous(), mask


def test_image_and_mask_stay_together():
    image, mask = checkerboard()
    differing = []
    for seed in range(40):
        made = augment(image, mask, PLAIN, seed)
        read = (made.image[0].float() / 10).round().int()
        differing.append((read != made.mask)[made.valid].float().mean().item())
    assert max(differing) < 0.15  # only the blurred edges of the cells
    assert np.mean(differing) < 0.06


def test_output_size_padding_and_types():
    image, mask = checkerboard(30, 90)
    for seed in range(20):
        made = augment(image, mask, PLAIN, seed)
        assert made.image.shape == (3, 48, 48)
        assert made.image.dtype == torch.uint8
        assert made.valid.dtype == torch.bool
        assert (made.image[:, ~made.valid] == 0).all()
        assert (made.mask[~made.valid] == -1).all()
        assert (made.mask[made.valid] >= 0).all()
        height, width = made.valid.any(1).sum(), made.valid.any(0).sum()
        assert made.valid[:height, :width].all()
    assert augment(image, None, PLAIN, 0).mask is None


def test_sizes_follow_the_paper():
    assert fitted_size(480, 640, (2048, 512)) == (512, 683)
    assert fitted_size(100, 1000, (2048, 512)) == (205, 2048)
    assert fitted_size(480, 640, (320, 320)) == (240, 320)
    assert fitted_size(480, 640, (2048, 512), 0.5) == (256, 341)
    assert fitted_size(1, 1000, (10, 10)) == (1, 10)
    assert nearest_indices(4, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest_indices(8, 4).tolist() == [1, 3, 5, 7]


def test_a_pure_function_of_the_seed_that_leaves_the_global_generators_alone():
    image, mask = checkerboard()
    config = replace(PLAIN, photometric=True)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = augment(image, mask, config, 7)
    torch.manual_seed(1)
    random.seed(1)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    again = augment(image, mask, config, 7)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert first.crop_box == again.crop_box
    assert not torch.equal(first.image, augment(image, mask, config, 8).image)


def test_a_crop_of_one_class_is_drawn_again():
    """A small object in a corner: by the mask it is hit far more often than by chance."""
    image, mask = torch.zeros(3, 200, 200, dtype=torch.uint8), torch.zeros(200, 200).int()
    mask[:40, :40] = 1
    config = AugmentConfig((200, 200), (1.0, 1.0), 50, photometric=False)

    def hits(**settings):
        made = (augment(image, mask, config, seed, **settings) for seed in range(100))
        return sum(bool((crop.mask == 1).any()) for crop in made)

    by_mask, by_chance = hits(), hits(crop_by_mask=False)
    assert by_mask > 2 * by_chance
    free = replace(config, category_max_ratio=1.0)
    for seed in range(10):
        expected = augment(image, mask, config, seed, crop_by_mask=False)
        assert torch.equal(augment(image, mask, free, seed).mask, expected.mask)


def test_unknown_pixels_do_not_count_as_a_class():
    image, mask = torch.zeros(3, 100, 100, dtype=torch.uint8), torch.full((100, 100), -1).int()
    config = AugmentConfig((100, 100), (1.0, 1.0), 50, photometric=False)
    assert (augment(image, mask, config, 0).mask == -1).all()


def test_flip_and_scale_have_the_distribution_that_is_asked_for():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    image[:, :, :50] = 255
    whole = AugmentConfig((100, 100), (0.5, 2.0), 200, photometric=False)
    sides, flipped = [], 0
    for seed in range(400):
        made = augment(image, None, whole, seed)
        sides.append(int(made.valid[0].sum()))
        flipped += int(made.image[0, 0, 0] == 0)
    assert 50 <= min(sides) < 60
    assert 190 < max(sides) <= 200
    assert 118 < np.mean(sides) < 132
    assert 160 < flipped < 240


def test_colours_change_within_their_bounds():
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    values = [int(distort_colours(grey, random.Random(seed))[0, 0, 0]) for seed in range(500)]
    assert (100 - 32) * 0.5 - 1 <= min(values) < 50
    assert 180 < max(values) <= (100 + 32) * 1.5 + 1
    assert values.count(100) > 50  # each change has a chance of one half


@pytest.mark.parametrize(("gain", "turn"), [(1.0, 0.1), (1.0, -0.1), (0.5, 0.0), (1.4, 0.05)])
def test_hue_and_saturation_against_colorsys(gain, turn):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 6, 6), dtype=np.uint8))
    made = _shift_colours(image, gain, turn).permute(1, 2, 0).reshape(-1, 3)
    for before, after in zip(image.permute(1, 2, 0).reshape(-1, 3).tolist(), made, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in before))
        turned = colorsys.hsv_to_rgb((hue + turn) % 1, min(1, saturation * gain), value)
        assert (after - torch.tensor(turned) * 255).abs().max() < 8  # 256 levels of hue


@pytest.mark.parametrize(
    "settings",
    [{"crop": 0}, {"scale_range": (2.0, 0.5)}, {"flip": 1.5}, {"category_max_ratio": 0.0}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="augmentation: "):
        AugmentConfig(**settings)


def ramp(height=90, width=120):
    """An image whose red channel rises with the row, its green one with the column."""
    rows = (torch.arange(height) + 0.5) / height * 200
    columns = (torch.arange(width) + 0.5) / width * 200
    image = torch.stack(torch.broadcast_tensors(rows[:, None], columns[None], torch.zeros(1, 1)))
    return image.round().to(torch.uint8)


@pytest.mark.parametrize("keep_ratio", [True, False])
def test_a_crop_is_where_its_place_says(keep_ratio):
    """Within half a pixel of the stored image, plus the rounding of the ramp's colours."""
    image = ramp()
    mask = torch.arange(90 * 120).reshape(90, 120).int()
    config = AugmentConfig((100, 70), (0.5, 2.0), 60, photometric=False, keep_ratio=keep_ratio)
    sizes = set()
    for seed in range(60):
        made = augment(image, mask, config, seed, saliency=image[0])
        place = made.crop_box
        assert made.valid[: place.rows, : place.columns].all()
        assert made.valid.sum() == place.rows * place.columns
        across = (torch.arange(place.columns) + 0.5) / place.columns
        across = 1 - across if place.flipped else across
        down = (torch.arange(place.rows) + 0.5) / place.rows
        x, y = place.left + place.width * across, place.top + place.height * down
        inside = made.image[:, : place.rows, : place.columns].float() / 200
        border = 2  # rows and columns that antialiasing at the edge of the image can touch
        wanted = torch.stack(torch.broadcast_tensors(y[:, None], x[None]))
        differing = (inside[:2] - wanted).abs()[:, border:-border, border:-border]
        assert differing.amax() < 1 / 90 + 0.5 / 200
        stored = made.mask[: place.rows, : place.columns]
        assert (stored // 120 - (y * 90)[:, None] + 0.5).abs().max() < 0.51
        assert (stored % 120 - (x * 120)[None] + 0.5).abs().max() < 0.51
        row = stored.long() // 120
        grey = image[0, row, 0].float() / 255
        assert torch.equal(made.saliency[: place.rows, : place.columns], grey)
        assert (made.saliency[~made.valid] == -1).all()
        sizes.add((place.flipped, place.rows, place.columns))
    assert {flipped for flipped, _, _ in sizes} == {False, True}
    assert {True, False} == {rows < 60 for _, rows, _ in sizes}


def test_without_the_ratio_every_image_fills_the_crop():
    config = AugmentConfig((2048, 512), (1.0, 1.0), 48, keep_ratio=False)
    for height, width in ((30, 90), (90, 30), (7, 500)):
        made = augment(torch.zeros(3, height, width, dtype=torch.uint8), None, config, 3)
        assert made.valid.all()
        flipped = made.crop_box.flipped
        assert made.crop_box == (0.0, 0.0, 1.0, 1.0, flipped, 48, 48)
    assert resized_size(30, 90, replace(config, crop=321), 1.25) == (401, 401)
    assert resized_size(30, 90, replace(config, keep_ratio=True, resize=(60, 60)), 1) == (20, 60)


def test_saliency_does_not_change_the_crop():
    image, mask = checkerboard()
    config = replace(PLAIN, photometric=True)
    for seed in range(5):
        with_it = augment(image, mask, config, seed, saliency=image[0])
        without = augment(image, mask, config, seed)
        assert torch.equal(with_it.image, without.image) and with_it.crop_box == without.crop_box
        assert without.saliency is None
