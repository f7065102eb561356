"""The paired augmentation: pairing, sizes, padding, and that it is a pure function of its seed."""

import colorsys
import math
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
    scaled_size,
    swap_ids,
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
        assert (after - torch.tensor(turned) * 255).abs().max() < 10  # 256 levels of hue


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": 0},
        {"crop": (48, 0)},
        {"scale_range": (2.0, 0.5)},
        {"flip": 1.5},
        {"category_max_ratio": 0.0},
        {"rotate": -1.0},
        {"rotate": 181.0},
        {"rotate": float("nan")},
        {"rotate": 10.0, "rotate_chance": 1.5},
    ],
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
    config = AugmentConfig((48, 48), (1.0, 1.0), 48, keep_ratio=False)
    for height, width in ((30, 90), (90, 30), (7, 500)):
        made = augment(torch.zeros(3, height, width, dtype=torch.uint8), None, config, 3)
        assert made.valid.all()
        flipped = made.crop_box.flipped
        assert made.crop_box == (0.0, 0.0, 1.0, 1.0, flipped, 48, 48)
    assert resized_size(30, 90, (321, 321), 1.25, keep_ratio=False) == (401, 401)
    assert resized_size(30, 90, (90, 60), 0.5, keep_ratio=False) == (30, 45)
    assert resized_size(90, 30, (60, 90), 0.5, keep_ratio=False) == (45, 30)
    assert scaled_size(1, 90, 0.1) == (1, 9)
    assert resized_size(30, 90, (60, 60), keep_ratio=True) == (20, 60)


def test_saliency_does_not_change_the_crop():
    image, mask = checkerboard()
    config = replace(PLAIN, photometric=True)
    for seed in range(5):
        with_it = augment(image, mask, config, seed, saliency=image[0])
        without = augment(image, mask, config, seed)
        assert torch.equal(with_it.image, without.image) and with_it.crop_box == without.crop_box
        assert without.saliency is None


def test_stretched_then_scaled_then_cropped():
    """LIP's: every picture to 520 x 520, times 0.75 .. 1.25, a crop of 473 (here a tenth)."""
    config = AugmentConfig((52, 52), (0.75, 1.25), 47, keep_ratio=False, photometric=False)
    boxes = [augment(ramp(), None, config, seed).crop_box for seed in range(200)]
    sides = [min(box.rows / box.height, box.columns / box.width) for box in boxes]
    assert all(box.rows / box.height == pytest.approx(box.columns / box.width) for box in boxes)
    assert 39 <= round(min(sides)) <= 41 and 63 <= round(max(sides)) <= 65
    assert {box.rows for box in boxes} >= {40, 47} and max(box.rows for box in boxes) == 47


def test_without_rotation_the_stream_is_what_it_was():
    """Figures of the version before there was a rotation."""
    config = AugmentConfig((96, 64), crop=48)
    grey = torch.full((3, 60, 80), 100, dtype=torch.uint8)
    made = [augment(grey, None, config, seed) for seed in range(4)]
    assert [
        (crop.crop_box.flipped, crop.crop_box.rows, crop.crop_box.columns) for crop in made
    ] == [(True, 48, 48), (True, 45, 48), (True, 48, 48), (False, 48, 48)]
    assert [int(crop.image[0, 0, 0]) for crop in made] == [100, 97, 100, 133]


@pytest.mark.parametrize("turn", [0.0, 30.0])
def test_a_square_given_by_its_side_or_by_both_is_the_same(turn):
    image, mask = checkerboard()
    side = AugmentConfig((96, 64), crop=48, rotate=turn)
    both = replace(side, crop=[48, 48])
    assert side.crop == 48 and side.crop_size == both.crop == (48, 48)
    for seed in range(20):
        one, other = (augment(image, mask, c, seed, saliency=image[0]) for c in (side, both))
        assert one.crop_box == other.crop_box
        for name in ("image", "valid", "mask", "saliency"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(
    ("crop", "turn"), [((40, 90), 0.0), ((90, 40), 0.0), ((40, 90), 30.0), ((90, 40), 30.0)]
)
def test_a_rectangular_crop_has_its_height_and_width(crop, turn):
    """Image, mask and saliency stay together; the mask holds the numbers of the stored pixels."""
    height, width = crop
    image, mask = ramp(), torch.arange(90 * 120).reshape(90, 120).int()
    config = AugmentConfig((120, 90), (0.5, 2.0), crop, photometric=False, rotate=turn,
                           rotate_chance=1.0, category_max_ratio=1.0)  # fmt: skip
    padded = set()
    for seed in range(60):
        made = augment(image, mask, config, seed, saliency=image[0])
        box = made.crop_box
        assert made.image.shape == (3, height, width)
        assert made.valid.shape == made.mask.shape == made.saliency.shape == crop
        assert box.rows <= height and box.columns <= width
        stored = made.mask[made.valid].long()
        wanted = torch.stack([(stored // 120 + 0.5) / 90, (stored % 120 + 0.5) / 120])
        shown = made.image[:2, made.valid].float() / 200
        assert (shown - wanted).abs().quantile(0.95) < 2.5 / 90  # antialiasing at the border
        assert torch.equal(made.saliency[made.valid], image[0].flatten()[stored].float() / 255)
        assert (made.mask[~made.valid] == -1).all() and (made.saliency[~made.valid] == -1).all()
        if not turn:
            assert made.valid[: box.rows, : box.columns].all()
            assert made.valid.sum() == box.rows * box.columns
            rows = stored.reshape(box.rows, box.columns)[:, 0] // 120
            assert abs(int(rows[0]) - box.top * 90) < 1.01
        padded.add((box.rows < height, box.columns < width))
    assert {(False, False)} < padded


def test_a_rectangular_crop_looks_for_more_than_one_class_in_all_of_itself():
    """The second class is a strip below: within 60 rows of the top there is none of it."""
    image, mask = torch.zeros(3, 200, 200, dtype=torch.uint8), torch.zeros(200, 200).int()
    mask[140:] = 1
    config = AugmentConfig((200, 200), (1.0, 1.0), (120, 30), photometric=False)

    def hits(**settings):
        made = (augment(image, mask, config, seed, **settings) for seed in range(100))
        return sum(bool((crop.mask == 1).any()) for crop in made)

    assert hits() > hits(crop_by_mask=False) > 50
    wide = replace(config, crop=(30, 120))
    tops = [augment(image, mask, wide, seed, crop_by_mask=False).crop_box for seed in range(200)]
    assert max(box.top for box in tops) > 0.8 and max(box.left for box in tops) < 0.41


TURNING = AugmentConfig((100, 70), (0.5, 2.0), 60, photometric=False, rotate=30, rotate_chance=1.0)


def turned(seed, config=TURNING, height=90, width=120):
    """A crop of the ramp; its mask holds the number of the stored pixel."""
    mask = torch.arange(height * width).reshape(height, width).int()
    return augment(ramp(height, width), mask, config, seed, saliency=ramp(height, width)[0])


@pytest.mark.parametrize("keep_ratio", [True, False])
def test_a_turned_crop_is_turned_about_its_centre(keep_ratio):
    """From where its pixels lie in the stored image: angle, scale, centre and mirror of the map."""
    config = replace(TURNING, keep_ratio=keep_ratio)
    angles, mirrored = [], set()
    for seed in range(80):
        made = turned(seed, config)
        box = made.crop_box
        size = np.array([box.rows / box.height, box.columns / box.width])  # of the resized image
        y, x = (part.double().numpy() for part in torch.where(made.valid))
        stored = made.mask[made.valid].numpy()
        points = np.stack([(stored // 120 + 0.5) / 90, (stored % 120 + 0.5) / 120], 1) * size
        offsets = np.stack([y + 0.5 - box.rows / 2, x + 0.5 - box.columns / 2, np.ones(len(y))], 1)
        (to_y, to_x, centre), *_ = np.linalg.lstsq(offsets, points, rcond=None)
        matrix = np.stack([to_y, to_x], 1)
        assert np.abs(matrix @ matrix.T - np.eye(2)).max() < 0.05  # no shear, no other scale
        assert (np.linalg.det(matrix) < 0) == box.flipped
        middle = [box.top + box.height / 2, box.left + box.width / 2] * size
        assert np.abs(centre - middle).max() < 1
        angles.append(math.degrees(math.atan2(matrix[1, 0], matrix[0, 0])))
        if box.flipped:
            angles[-1] = math.degrees(math.atan2(-matrix[1, 0], matrix[0, 0]))
        mirrored.add(box.flipped)
    assert mirrored == {True, False}
    assert -32 < min(angles) < -20 and 20 < max(angles) < 32
    assert abs(np.mean(angles)) < 8 and np.std(angles) > 10


def test_a_turned_crop_stays_with_its_mask_and_pads_what_is_outside():
    num_beyond = 0
    for seed in range(40):
        made = turned(seed)
        valid, box = made.valid, made.crop_box
        assert made.image.dtype == torch.uint8 and made.mask.dtype == torch.int32
        assert (made.image[:, ~valid] == 0).all() and (made.mask[~valid] == -1).all()
        assert (made.saliency[~valid] == -1).all() and (made.mask[valid] >= 0).all()
        assert 0 < valid.sum() < valid.numel() or box.rows == box.columns == 60
        stored = made.mask[valid].long()
        shown = made.image[:2, valid].float() / 200
        wanted = torch.stack([(stored // 120 + 0.5) / 90, (stored % 120 + 0.5) / 120])
        assert (shown - wanted).abs().max() < 2 / 90  # nearest, bilinear and the border
        grey = ramp()[0].flatten()[stored].float() / 255
        assert torch.equal(made.saliency[valid], grey)
        if box.rows == box.columns == 60:
            y, x = (stored // 120 + 0.5) / 90, (stored % 120 + 0.5) / 120
            num_beyond += int(((y < box.top) | (x < box.left)).sum())
    assert num_beyond > 100  # a turned crop sees the image beyond the sides of the straight one


def test_colours_do_not_reach_the_padding_of_a_turned_crop():
    config = replace(TURNING, photometric=True, crop=120)
    for seed in range(10):
        made = turned(seed, config)
        assert (made.image[:, ~made.valid] == 0).all() and not made.valid.all()


def test_rotation_has_the_chance_that_is_asked_for():
    config = replace(TURNING, rotate_chance=0.3, resize=(60, 60), scale_range=(1.0, 1.0))
    straight = sum(bool(turned(seed, config, 90, 90).valid.all()) for seed in range(300))
    assert 180 < straight < 240
    never = replace(config, rotate_chance=0.0)
    assert all(turned(seed, never, 90, 90).valid.all() for seed in range(20))


def test_swapped_ids():
    ids = torch.tensor([[0, 1, 2], [3, -1, 1]])
    assert swap_ids(ids, ((1, 3),)).tolist() == [[0, 3, 2], [1, -1, 3]]
    assert swap_ids(ids, ((1, 3), (2, 0))).tolist() == [[2, 3, 0], [1, -1, 3]]
    assert swap_ids(ids.int(), ((1, 3),)).dtype == torch.int32
    assert torch.equal(swap_ids(ids, ()), ids)
