import pytest
import torch
import torch.nn.functional as F

from memseg_dist.nn.pixel_loss import pixel_cross_entropy

DOUBLE = torch.float64


@pytest.mark.parametrize("denominator", ["all", "valid"])
@pytest.mark.parametrize("strip_elements", [1, 300, 1 << 24])
@pytest.mark.parametrize("with_bias", [False, True])
def test_ready_logits_need_no_product(denominator, strip_elements, with_bias):
    logits = torch.randn(2, 7, 3, 4, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(7, dtype=DOUBLE, requires_grad=True) if with_bias else None
    target = torch.randint(-1, 7, (2, 13, 16))
    leaves = (logits, bias) if with_bias else (logits,)

    def ours(weight):
        return pixel_cross_entropy(
            logits,
            weight,
            target,
            bias_N=bias,
            denominator=denominator,
            strip_elements=strip_elements,
        )

    def slow():
        low = logits if bias is None else logits + bias[:, None, None]
        high = F.interpolate(low, (13, 16), mode="bilinear", align_corners=False)
        total = F.cross_entropy(high, target, ignore_index=-1, reduction="sum")
        return total / (target.numel() if denominator == "all" else (target >= 0).sum())

    got = ours(None)
    gradients = torch.autograd.grad(3 * got, leaves)
    for expected in (slow(), ours(torch.eye(7, dtype=DOUBLE))):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        for found, wanted in zip(gradients, torch.autograd.grad(3 * expected, leaves), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_nothing_of_pixels_by_classes_is_kept_of_ready_logits():
    logits = torch.randn(1, 50, 8, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        pixel_cross_entropy(logits, None, torch.randint(0, 50, (1, 64, 64)))
    assert max(saved) <= logits.numel()


def test_without_gradient_the_loss_is_the_same():
    logits, target = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randint(-1, 5, (2, 9, 11))
    expected = pixel_cross_entropy(logits, None, target)
    with torch.no_grad():
        assert torch.equal(pixel_cross_entropy(logits, None, target), expected)
