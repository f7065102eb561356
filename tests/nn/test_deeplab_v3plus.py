"""DeepLabV3+: its sizes, what its separable convolutions are, and how its maps meet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memseg_dist.nn.deeplab_v3plus import DeepLabV3Plus, separable_conv


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_of_a_resnet_101_and_21_classes():
    """Every convolution without a bias, with a scale and a shift behind it, but the last."""

    def pointwise(inside: int, outside: int) -> int:
        return inside * outside + 2 * outside

    def separable(inside: int, outside: int) -> int:
        return 9 * inside + 2 * inside + pointwise(inside, outside)

    pyramid = 2 * pointwise(2048, 256) + 3 * separable(2048, 256) + pointwise(5 * 256, 256)
    decoder = pointwise(256, 48) + separable(304, 256) + separable(256, 256)
    assert count(DeepLabV3Plus(256, 2048, 21)) == pyramid + decoder + 256 * 21 + 21


@pytest.mark.parametrize("rate", [1, 3])
def test_a_separable_convolution_is_one_by_channel_then_one_by_position(rate):
    module = separable_conv(4, 6, rate).eval()
    depthwise, pointwise = module[0], module[1]
    maps = torch.randn(2, 4, 9, 8)
    expected = torch.zeros(2, 4, 9, 8)
    padded = F.pad(maps, [rate] * 4)
    for y in range(3):
        for x in range(3):
            weight = depthwise[0].weight[:, 0, y, x]
            window = padded[:, :, y * rate : y * rate + 9, x * rate : x * rate + 8]
            expected += weight[:, None, None] * window
    expected = depthwise[1](expected).relu()
    mixed = torch.einsum("bchw,dc->bdhw", expected, pointwise[0].weight[:, :, 0, 0])
    torch.testing.assert_close(module(maps), pointwise[1](mixed).relu(), rtol=1e-4, atol=1e-5)


def test_logits_have_the_size_of_the_finer_map_and_both_maps_matter():
    torch.manual_seed(0)
    module = DeepLabV3Plus(5, 7, 3, rates=(1, 2), dim=8, reduced_dim=4).eval()
    fine, deep = torch.randn(2, 5, 16, 12), torch.randn(2, 7, 4, 3)
    fine.requires_grad_(), deep.requires_grad_()
    logits = module(fine, deep)
    assert logits.shape == (2, 3, 16, 12)
    for gradient in torch.autograd.grad(logits.square().sum(), (fine, deep)):
        assert gradient.abs().max() > 0


def test_the_pooled_branch_sees_the_whole_map():
    """Every position of the result depends on the farthest position of the deep map."""
    torch.manual_seed(0)
    module = DeepLabV3Plus(5, 7, 3, rates=(1,), dim=8).eval()
    fine, deep = torch.randn(1, 5, 40, 40), torch.randn(1, 7, 40, 40).requires_grad_()
    corner = module(fine, deep)[0, :, 0, 0].sum()
    (gradient,) = torch.autograd.grad(corner, deep)
    assert gradient[0, :, -1, -1].abs().max() > 0
