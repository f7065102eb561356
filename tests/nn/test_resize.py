"""Resizing as matrix products: the library's values, the exact adjoint, and what positions span."""

import pytest
import torch
import torch.nn.functional as F

from memseg_dist.nn.resize import padded_size, upsample, upsample_adjoint, upsample_positions


@pytest.mark.parametrize(
    ("positions", "length", "spanned"),
    [(4, 32, 32), (3, 20, 21), (5, 9, 10), (1, 7, 7), (5, 6, 6), (4, 9, 9), (7, 7, 7)],
)
def test_positions_span_whole_strides_of_a_padding_net(positions, length, spanned):
    """ceil(length / stride) positions of one stride s span s each; others span the image."""
    assert padded_size(torch.zeros(2, positions, 1), (length, 1)) == (spanned, 1)
    assert padded_size(torch.zeros(2, 1, positions), (1, length)) == (1, spanned)


def test_positions_are_enlarged_over_their_span_and_cut():
    maps = torch.randn(2, 3, 4)
    whole = F.interpolate(maps[None], size=(21, 32), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(upsample_positions(maps, (20, 32)), whole[:, :20])


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
