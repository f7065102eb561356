"""Resizing as matrix products: the library's values, the exact adjoint, and what positions span."""

import pytest
import torch
import torch.nn.functional as F

from memseg_dist.nn.resize import (
    at_positions,
    upsample,
    upsample_adjoint,
    upsample_positions,
    valid_positions,
)


def test_positions_are_enlarged_over_whole_strides_and_cut():
    maps = torch.randn(2, 3, 4)
    whole = F.interpolate(maps[None], size=(24, 32), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(upsample_positions(maps, (20, 32), 8), whole[:, :20])


@pytest.mark.parametrize("length", [321, 513])
@pytest.mark.parametrize("stride", [8, 14, 32])
def test_an_enlarged_map_is_where_the_image_is(length, stride):
    """However much of the last position is padding: a map that knows its places says so."""
    ramp = stride * (torch.arange(float(-(-length // stride))) + 0.5)
    found = upsample_positions(ramp.expand(1, 3, -1), (3 * stride, length), stride)[0, 0]
    inside = slice(stride // 2, len(ramp) * stride - stride // 2)  # beyond: the outermost value
    torch.testing.assert_close(found[inside], torch.arange(length)[inside] + 0.5)


def test_pixels_are_read_at_the_centres_of_positions():
    """Two positions of 16 over 17 pixels: the second one's centre lies beyond them."""
    pixels = torch.ones(1, 17, 25, dtype=torch.bool)
    found = at_positions(pixels, torch.zeros(1, 2, 2), 16)[0]
    assert found.tolist() == [[True, True], [False, False]]


def test_padding_that_fills_the_last_stride_is_no_image():
    valid = torch.ones(1, 9, 12, dtype=torch.bool)
    found = valid_positions(valid, 4).unflatten(1, (3, 3))[0]
    assert found.tolist() == [[True] * 3, [True] * 3, [False] * 3]


@pytest.mark.parametrize("rows", [slice(None), slice(3, 11)])
def test_matrix_products_equal_the_librarys_enlarging_and_its_adjoint(rows):
    low = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    wanted = F.interpolate(low, size=(17, 9), mode="bilinear", align_corners=False)[:, :, rows]
    found = upsample(low, (17, 9), rows)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(wanted)
    (gradient,) = torch.autograd.grad((wanted * weight).sum(), low)
    torch.testing.assert_close(upsample_adjoint(weight, (5, 4), 17, rows), gradient)
    assert found.dtype == torch.float64 and upsample(low.float(), (17, 9)).dtype == torch.float32
