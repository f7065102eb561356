"""Charts are pictures of the size they promise, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest

from memseg_dist.tools.pictures.draw import MAX_BARS, MAX_NAMED_BARS, draw_chart


@pytest.mark.parametrize("count", [0, 1, MAX_BARS, 5000])
def test_any_number_of_values_gives_a_picture(count):
    picture = draw_chart("rows", np.arange(count, dtype=np.float32))
    assert picture.dtype == np.uint8 and picture.shape == (300, 800, 3)
    assert np.array_equal(picture, draw_chart("rows", np.arange(count, dtype=np.float32)))


def test_a_taller_bar_takes_more_ink():
    def ink(values):
        return (draw_chart("rows", np.array(values)) < 250).any(axis=-1).sum()

    assert ink([4.0, 4.0, 4.0]) > ink([4.0, 1.0, 1.0])


@pytest.mark.parametrize("count", [3, 5000])
def test_values_that_are_not_finite_are_left_out(count):
    values = np.ones(count)
    values[0], values[1] = np.nan, np.inf
    assert draw_chart("rows", values).shape == (300, 800, 3)


def test_bars_have_the_names_of_their_classes_where_these_fit():
    def draw(count, *names):
        return draw_chart("rows", np.ones(count), *names)

    names = {1: "cat", 3: "dog"}
    assert not np.array_equal(draw(4, names), draw(4))
    assert not np.array_equal(draw(4, names), draw(4, {1: "cat", 2: "dog"}))
    assert draw(MAX_NAMED_BARS, names).shape[0] > 3000  # each name has its line
    crowded = draw(MAX_NAMED_BARS + 1, names)
    assert np.array_equal(crowded, draw(MAX_NAMED_BARS + 1))


def test_drawing_leaves_the_plotting_state_alone():
    import matplotlib.pyplot as plt

    draw_chart("rows", np.ones(3))
    assert plt.get_fignums() == []


def test_a_table_is_refused():
    with pytest.raises(ValueError, match=r"chart 'rows' has values of shape \(2, 3\)"):
        draw_chart("rows", np.zeros((2, 3)))
