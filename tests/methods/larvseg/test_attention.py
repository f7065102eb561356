"""What the losses cannot show: an image in which no class is background."""

import pytest
import torch
import torch.nn.functional as F

from memseg_dist.methods.larvseg.attention import mined_background


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_without_a_background_class_the_background_is_zero(reduction):
    features = F.normalize(torch.randn(2, 6, 4), dim=-1)
    weight = F.normalize(torch.randn(5, 4), dim=-1)
    background, count = mined_background(
        features, torch.ones(2, 6, dtype=torch.bool), features @ weight[0], torch.tensor([0, 1]),
        weight, weight, torch.zeros(5, dtype=torch.bool), peak_threshold=-1.0,
        distance_threshold=0.0, reduction=reduction,
    )  # fmt: skip
    assert count.tolist() == [0, 0] and not background.any()
