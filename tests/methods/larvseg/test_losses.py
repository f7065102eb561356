"""Every fast loss against its slow definition, value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from memseg_dist.methods.larvseg.classifier import class_covariance, class_normalised
from memseg_dist.methods.larvseg.losses import (
    image_cross_entropy,
    pooled_logits,
    pooling_weights,
)
from memseg_dist.nn.pixel_loss import pixel_cross_entropy
from memseg_dist.nn.resize import upsample, upsample_adjoint

DOUBLE = torch.float64


@pytest.mark.parametrize(
    ("low", "high"), [((4, 4), (32, 32)), ((3, 5), (10, 17)), ((6, 4), (7, 4))]
)
def test_upsample_is_interpolate_and_its_adjoint_is_the_gradient(low, high):
    z = torch.randn(2, 3, *low, dtype=DOUBLE, requires_grad=True)
    expected = F.interpolate(z, high, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample(z, high), expected, rtol=0, atol=1e-12)
    rows = slice(2, 6)
    torch.testing.assert_close(upsample(z, high, rows), expected[:, :, rows], rtol=0, atol=1e-12)
    weights = torch.randn(2, 3, *high, dtype=DOUBLE)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), z)
    adjoint = upsample_adjoint(weights, low, high[0])
    torch.testing.assert_close(adjoint, gradient, rtol=0, atol=1e-12)


def test_integer_enlargement_keeps_the_mean():
    z = torch.randn(1, 4, 5, 6, dtype=DOUBLE)
    torch.testing.assert_close(upsample(z, (40, 48)).mean((2, 3)), z.mean((2, 3)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("with_duplicates", [False, True])
def test_class_normalised_feature_gives_the_layernorm_softmax(dtype, tolerance, with_duplicates):
    x = F.normalize(torch.randn(3, 11, 16, dtype=dtype), dim=-1).requires_grad_()
    weight = F.normalize(torch.randn(29, 16, dtype=dtype), dim=-1).requires_grad_()
    gamma = torch.tensor(1.7, dtype=dtype, requires_grad=True)
    multiplicity = torch.randint(1, 5, (29,)) if with_duplicates else None
    probe = torch.randn(3, 11, 29, dtype=dtype)

    def fast():
        logits = class_normalised(x, weight, gamma, multiplicity) @ weight.T
        return F.log_softmax(logits, dim=-1)

    def slow():
        repeats = multiplicity if with_duplicates else torch.ones(29, dtype=torch.int64)
        cosine = x @ weight.repeat_interleave(repeats, dim=0).T
        z = gamma * F.layer_norm(cosine, cosine.shape[-1:], eps=1e-5)
        first = torch.cumsum(repeats, 0) - repeats
        return F.log_softmax(z[..., first], dim=-1)

    torch.testing.assert_close(fast(), slow(), rtol=0, atol=tolerance)
    leaves = (x, weight, gamma)
    for got, expected in zip(
        torch.autograd.grad((fast() * probe).sum(), leaves),
        torch.autograd.grad((slow() * probe).sum(), leaves),
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 10)


def test_class_covariance_does_not_cancel_in_fp32():
    """Class vectors that hardly differ: E[ww] - E[w]E[w] would lose all digits."""
    weight = F.normalize(torch.ones(500, 64) + 1e-4 * torch.randn(500, 64), dim=-1)
    exact = torch.cov(weight.double().T, correction=0)
    relative = (class_covariance(weight) - exact).norm() / exact.norm()
    assert relative < 1e-3


@pytest.mark.parametrize("denominator", ["all", "valid"])
@pytest.mark.parametrize("strip_elements", [1, 500, 1 << 24])
@pytest.mark.parametrize("with_bias", [False, True])
def test_pixel_cross_entropy(denominator, strip_elements, with_bias):
    features = torch.randn(2, 8, 3, 4, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(7, 8, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(7, dtype=DOUBLE, requires_grad=True) if with_bias else None
    target = torch.randint(-1, 7, (2, 13, 16))
    got = pixel_cross_entropy(
        features,
        weight,
        target,
        bias_N=bias,
        denominator=denominator,
        strip_elements=strip_elements,
    )
    low = torch.einsum("bdhw,nd->bnhw", features, weight)
    logits = F.interpolate(low, (13, 16), mode="bilinear", align_corners=False)
    if bias is not None:
        logits = logits + bias[:, None, None]
    total = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
    expected = total / (target.numel() if denominator == "all" else (target >= 0).sum())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    leaves = (features, weight, bias) if with_bias else (features, weight)
    for got_gradient, expected_gradient in zip(
        torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * expected, leaves)
    ):
        torch.testing.assert_close(got_gradient, expected_gradient, rtol=0, atol=1e-9)


def test_pixel_cross_entropy_of_an_unlabelled_batch_is_zero():
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    target = torch.full((1, 8, 8), -1)
    loss = pixel_cross_entropy(features, torch.randn(3, 4), target, denominator="valid")
    loss.backward()
    assert loss.item() == 0
    assert features.grad.abs().max() == 0


def test_pixel_cross_entropy_keeps_no_tensor_of_pixels_by_classes():
    features = torch.randn(1, 8, 8, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        pixel_cross_entropy(features, weight, torch.randint(0, 1000, (1, 64, 64)))
    assert max(saved) <= weight.numel()


@pytest.mark.parametrize("by_attention", [False, True])
def test_pooled_logits_are_the_pooled_dense_logits(by_attention):
    low, high = (4, 5), (32, 40)
    features = torch.randn(2, 20, 6, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(9, 6, dtype=DOUBLE, requires_grad=True)
    image = torch.tensor([0, 0, 1])
    attention = torch.rand(3, *high, dtype=DOUBLE)
    valid = torch.zeros(3, *high, dtype=DOUBLE)
    valid[:, :20, 3:] = 1
    pooling = pooling_weights(attention, valid, low, by_attention=by_attention)
    got = pooled_logits(features, pooling, image, weight)

    dense = (features @ weight.T).mT.unflatten(2, low)
    enlarged = F.interpolate(dense, high, mode="bilinear", align_corners=False)[image]
    weighted = (enlarged * (attention * valid)[:, None]).sum((2, 3))
    mass = ((attention * valid) if by_attention else valid).sum((1, 2))
    expected = weighted / mass[:, None]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    probe = torch.randn(3, 9, dtype=DOUBLE)
    for got_gradient, expected_gradient in zip(
        torch.autograd.grad((got * probe).sum(), (features, weight)),
        torch.autograd.grad((expected * probe).sum(), (features, weight)),
    ):
        torch.testing.assert_close(got_gradient, expected_gradient, rtol=0, atol=1e-9)


def test_image_cross_entropy_removes_the_other_labels():
    logits = torch.randn(2, 5, dtype=DOUBLE)
    others = (torch.tensor([0, 0]), torch.tensor([1, 4]))
    got = image_cross_entropy(logits, torch.tensor([2, 0]), others, temperature=0.5)
    kept = torch.tensor([0, 2, 3])
    first = F.cross_entropy(logits[:1, kept] / 0.5, torch.tensor([1]))
    second = F.cross_entropy(logits[1:] / 0.5, torch.tensor([0]))
    torch.testing.assert_close(got, torch.stack([first, second]))
