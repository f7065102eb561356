"""Colours are distinct and stable; pictures have the parts they promise."""

from __future__ import annotations

import numpy as np
import pytest

from memseg_dist.batch import IGNORE
from memseg_dist.tools.pictures.panels import (
    class_colors,
    colorize,
    heatmap,
    overlay,
    palette,
    panel,
)

NAMES = {index: f"class {index}" for index in range(100)}


def test_colors_are_distinct_for_any_number_of_classes():
    for ids in (range(3), range(64), range(0, 21_841, 64), range(300)):
        colors = class_colors(ids)
        assert len(set(colors.values())) == len(ids)
    assert class_colors([]) == {} and class_colors([IGNORE]) == {}


def test_colors_are_stable_without_collisions():
    assert class_colors([5, 9])[9] == class_colors([9, 30, 63])[9]
    assert class_colors([2, 66]) == class_colors([66, 2])


def test_first_colors_are_far_apart_and_not_grey():
    colors = palette(12).astype(int)
    gaps = np.abs(colors[:, None] - colors[None]).sum(axis=-1) + 999 * np.eye(12, dtype=int)
    assert gaps.min() > 100
    assert np.ptp(palette(64).astype(int), axis=1).min() > 10


def test_ignored_pixels_are_hatched_grey():
    picture = colorize(np.full((20, 20), IGNORE), {})
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 2
    assert (picture[..., 0] == picture[..., 2]).all()


class NeverCompared(np.ndarray):
    def __eq__(self, other):
        raise AssertionError(f"the whole map was compared with class {other}")


def test_many_classes_are_painted_in_one_go():
    label_map = np.random.default_rng(0).integers(-1, 300, (60, 80))
    colors = class_colors(range(300))
    picture = colorize(label_map.view(NeverCompared), colors)
    known = label_map != IGNORE
    table = np.array([colors[class_id] for class_id in range(300)], np.uint8)
    assert (picture[known] == table[label_map[known]]).all()
    assert (picture[~known] == colorize(np.full_like(label_map, IGNORE), {})[~known]).all()


def test_overlay_has_the_image_and_a_legend():
    image = np.zeros((80, 60, 3), np.uint8)
    label_map = np.zeros((80, 60), int)
    label_map[:, 30:] = 7
    picture = np.asarray(overlay(image, label_map, NAMES, alpha=1.0))
    assert picture.shape[0] == 80 and picture.shape[1] > 60
    colors = class_colors([0, 7])
    assert tuple(picture[5, 5]) == colors[0] and tuple(picture[5, 50]) == colors[7]
    legend = picture[:, 60:].reshape(-1, 3)
    for color in colors.values():
        assert (legend == color).all(axis=1).any()


def test_legend_grows_and_is_cut():
    label_map = np.arange(100).repeat(4).reshape(20, 20)
    picture = overlay(np.zeros((20, 20, 3), np.uint8), label_map, NAMES, max_rows=10)
    assert 200 < picture.height < 300


@pytest.mark.parametrize("with_truth", [True, False])
@pytest.mark.parametrize("num_maps", [0, 1, 2])
def test_panel_has_one_tile_per_part(with_truth, num_maps):
    image = np.full((50, 50, 3), 90, np.uint8)
    prediction = np.zeros((50, 50), int)
    truth = np.full((50, 50), IGNORE) if with_truth else None
    maps = {f"map {i}": np.linspace(0, 1, 2500).reshape(50, 50) for i in range(num_maps)}
    picture = panel(image, truth, prediction, maps, NAMES, height=100)
    num_tiles = 2 + with_truth + num_maps
    assert picture.shape[1] == num_tiles * 108 + 230
    assert np.array_equal(picture, panel(image, truth, prediction, maps, NAMES, height=100))


def test_heatmap_brightens_with_the_value():
    row = heatmap(np.zeros((1, 5, 3), np.uint8), np.linspace(0, 1, 5)[None])
    assert (np.diff(row.astype(int).sum(axis=-1)) > 0).all()


def test_sizes_must_agree():
    image = np.zeros((4, 5, 3), np.uint8)
    with pytest.raises(ValueError, match="label map has"):
        overlay(image, np.zeros((5, 4), int), NAMES)
    with pytest.raises(ValueError, match="uint8"):
        panel(image.astype(float), None, np.zeros((4, 5), int), {}, NAMES)
    with pytest.raises(ValueError, match="cow: attention has"):
        panel(image, None, np.zeros((4, 5), int), {"cow: attention": np.zeros((5, 4))}, NAMES)
