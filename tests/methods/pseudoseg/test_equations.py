"""Eq. 2 - 4 of PseudoSeg, the activation in closed form and the strong view, against loops."""

from __future__ import annotations

from random import Random

import pytest
import torch
from reference import pseudoseg as reference
from torch import nn

from memseg_dist.methods.pseudoseg.augment import (
    adjust_contrast,
    adjust_saturation,
    cutout_box,
    strong_view,
)
from memseg_dist.methods.pseudoseg.fusion import (
    fuse,
    root_mean_square,
    sharpen,
    soft_cross_entropy,
)
from memseg_dist.methods.pseudoseg.sgc import SelfAttentionCam, class_activation

B, D, F, T, H, W = 2, 5, 3, 4, 3, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def part_valid() -> torch.Tensor:
    """The last row of the second image is padding."""
    valid = torch.ones(B, H, W, dtype=torch.bool)
    valid[1, -1] = False
    return valid


# -------------------------------------------------------------------- activation and attention


def test_closed_form_is_the_gradient_of_a_pooled_linear_head():
    classifier = nn.Linear(D, F).double()
    features = drawn(B, D, H, W).requires_grad_()
    shown = torch.tensor([[True, False, True], [True, True, True]])
    with torch.no_grad():
        classifier.weight[2] = -classifier.weight[2].abs()
        features[0] = features[0].abs()  # no position of image 0 speaks for class 2
    found = class_activation(
        features, classifier.weight, shown, torch.ones(B, H, W, dtype=torch.bool)
    )
    for b in range(B):
        one = features[b].detach().clone().requires_grad_()
        logits = classifier(one.mean(dim=(1, 2)))
        expected = reference.grad_cam(one, [*logits], shown[b].tolist())
        torch.testing.assert_close(found[b].detach(), expected)
    assert not found[0, 1].any() and not found[0, 2].any()
    assert torch.isfinite(found).all()


def test_padding_is_in_no_activation_and_no_maximum():
    features, weight, valid = drawn(B, D, H, W), drawn(F, D, seed=1), part_valid()
    features[1, :, -1] = 100 * weight.sum(dim=0)[:, None]
    found = class_activation(features, weight, torch.ones(B, F, dtype=torch.bool), valid)
    inside = class_activation(
        features[1:, :, :-1], weight, torch.ones(1, F, dtype=torch.bool), valid[1:, :-1]
    )
    assert not found[1, :, -1].any()
    torch.testing.assert_close(found[1, :, :-1], inside[0])


@pytest.mark.parametrize("background", [0, 2, None])
@pytest.mark.parametrize("affine", [False, True])
def test_attention_equals_the_loops_with_its_gradients(background, affine):
    """Values, the background's place, statistics of valid positions, and who learns."""
    num_classes = F + (background is not None)
    is_foreground = torch.arange(num_classes) != (-1 if background is None else background)
    torch.manual_seed(0)
    module = SelfAttentionCam(D + 2, is_foreground, dim=2, affine=affine).double()
    with torch.no_grad():
        module.shift.normal_()
        if affine:
            module.scale.normal_()
    deep, previous = drawn(B, D, H, W), drawn(B, 2, 2 * H, 2 * W, seed=1)
    deep.requires_grad_(), previous.requires_grad_()
    cam, valid = drawn(B, F, H, W, seed=2).sigmoid().requires_grad_(), part_valid()
    cam.data[1, :, -1] = 0
    found = module(deep, previous, cam, valid)

    resized = nn.functional.interpolate(previous, (H, W), mode="bilinear", align_corners=False)
    hyper = torch.cat([deep, resized], dim=1).detach()
    scores = []
    for b in range(B):
        parts = (module.query(hyper[b]), module.key(hyper[b]), cam[b].detach())
        query, key, value = (part.flatten(1) for part in parts)
        foreground = reference.attended(query, key, value, valid[b].flatten())
        rows = [*foreground]
        if background is not None:
            rows.insert(background, 2 - foreground.amax(dim=0))
        scores.append(torch.stack(rows).unflatten(1, (H, W)))
    mixed = module.mix(torch.stack(scores))
    seen = mixed.movedim(1, 3)[valid]  # [positions, classes]
    mean, var = seen.mean(dim=0), seen.var(dim=0, unbiased=False)
    expected = (mixed - mean[:, None, None]) / (var + 1e-3).sqrt()[:, None, None]
    if affine:
        expected = expected * module.scale[:, None, None]
    expected = expected + module.shift[:, None, None]
    torch.testing.assert_close(found, expected)

    weights = drawn(*found.shape, seed=3)
    parameters = list(module.parameters())
    inputs = [deep, previous, cam]
    ours = torch.autograd.grad((found * weights).sum(), parameters + inputs, allow_unused=True)
    slow = torch.autograd.grad((expected * weights).sum(), parameters)
    for one, other in zip(ours, slow):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0
    assert ours[len(parameters) :] == (None, None, None), "L_sa must reach no map"


def test_a_blank_image_leaves_the_attention_finite():
    module = SelfAttentionCam(D + 2, torch.tensor([False, True, True, True]), dim=2).double()
    valid = part_valid()
    valid[0] = False
    cam = drawn(B, F, H, W).sigmoid()
    logits = module(drawn(B, D, H, W), drawn(B, 2, H, W), cam, valid)
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


# -------------------------------------------------------------------- fusion and loss


def test_one_root_mean_square_for_both_sources():
    p, m, valid = drawn(B, T, H, W), 3 * drawn(B, T, H, W, seed=1), part_valid()
    both = [logits.movedim(1, 3)[valid] for logits in (p, m)]
    wanted = torch.cat(both).square().mean().sqrt()
    for r in root_mean_square(p, m, valid, "batch"):
        torch.testing.assert_close(r.squeeze(), wanted)
    for r in root_mean_square(p, m, valid, "image"):
        assert r.shape == (B, 1, 1, 1)
        own = torch.cat([logits[1].movedim(0, 2)[valid[1]] for logits in (p, m)])
        torch.testing.assert_close(r[1].squeeze(), own.square().mean().sqrt())
    own_r = root_mean_square(p, m, valid, "per_source")
    for r, own in zip(own_r, both):
        torch.testing.assert_close(r.squeeze(), own.square().mean().sqrt())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("gamma", "temperature"), [(0.5, 0.5), (0.3, 0.7), (1.0, 1.0)])
def test_pseudo_labels_equal_the_loops(gamma, temperature, centred):
    p, m, valid = 4 * drawn(B, T, H, W), drawn(B, T, H, W, seed=1), part_valid()
    found = sharpen(fuse(p, m, valid, gamma, centred=centred), temperature)
    expected = reference.calibrated(p, m, valid, gamma, temperature, centred)
    torch.testing.assert_close(found, expected)


def test_what_all_classes_have_in_common_changes_no_pseudo_label():
    p, m, valid = 4 * drawn(B, T, H, W), drawn(B, T, H, W, seed=1), part_valid()
    drift = 20 * drawn(B, 1, H, W, seed=2)
    torch.testing.assert_close(fuse(p + drift, m, valid), fuse(p, m, valid))
    apart = fuse(p + drift, m, valid, centred=False) - fuse(p, m, valid, centred=False)
    assert apart.abs().max() > 0.1


def test_sharpening_a_certain_class_stays_finite():
    certain = torch.tensor([[1.0, 0.0, 0.0]])[..., None, None]
    assert torch.equal(sharpen(certain, 0.1), certain)


def test_soft_loss_equals_the_loops_with_its_gradient():
    logits, target = drawn(B, T, H, W).requires_grad_(), drawn(B, T, H, W, seed=1).softmax(dim=1)
    valid = part_valid()
    counted = valid & (target.amax(dim=1) > 0.5)
    assert 0 < counted.sum() < valid.sum()
    found = soft_cross_entropy(logits, target, counted, valid)
    expected = reference.soft_loss(logits, target, counted, valid)
    torch.testing.assert_close(found, expected)
    pair = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*pair)
    nothing = torch.zeros_like(valid)
    assert soft_cross_entropy(logits, target, nothing, nothing) == 0


# -------------------------------------------------------------------- strong view


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.5, 20.0])
def test_saturation_is_that_of_hsv(factor):
    image = drawn(3, 5, 6).sigmoid()
    image[:, 0, 0] = 0.0
    image[:, 0, 1] = 0.3
    torch.testing.assert_close(
        adjust_saturation(image, factor=factor), reference.saturated(image, factor)
    )


def test_contrast_turns_about_the_mean_of_each_channel_where_it_is_valid():
    image, valid = drawn(3, 4, 5).sigmoid(), torch.ones(4, 5, dtype=torch.bool)
    valid[:, -1] = False
    found = adjust_contrast(image, valid=valid, factor=0.25)
    for channel, changed in zip(image, found):
        mean = channel[:, :-1].mean()
        torch.testing.assert_close(changed, mean + 0.25 * (channel - mean))


def images_of(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 3, 20, 24), generator=draw, dtype=torch.uint8)
    return images, torch.ones(3, 20, 24, dtype=torch.bool)


def test_a_strong_view_is_a_function_of_its_seed_and_differs_by_image():
    images, valid = images_of()
    images[1] = images[0]
    one, again, other = (strong_view(images, valid, seed) for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images) and torch.equal(one.cut, again.cut)
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.images[0], one.images[1])
    assert one.images.min() >= 0 and one.images.max() <= 255


def test_without_strength_nothing_changes_but_the_cut():
    images, valid = images_of()
    for brightness in ("additive", "multiplicative"):
        view = strong_view(images, valid, 3, strength=0.0, brightness=brightness, cutout=0.5)
        torch.testing.assert_close(view.images, images.float(), atol=1e-3, rtol=0)
    assert not strong_view(images, valid, 3, cutout=0.0).cut.any()


def test_brightness_is_added_or_multiplied():
    """A black picture stays black under a product."""
    images, valid = torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.ones(8, 4, 4) > 0
    added = strong_view(images, valid, 0, brightness="additive").images
    assert added.max() > 20
    assert not strong_view(images, valid, 0, brightness="multiplicative").images.any()


def test_cut_boxes_have_their_size_and_end_at_the_border():
    draw, areas = Random(0), []
    for _ in range(300):
        rows, columns = cutout_box((40, 60), 0.2, draw)
        assert 0 <= rows.start <= rows.stop <= 40 and 0 <= columns.start <= columns.stop <= 60
        areas.append((rows.stop - rows.start, columns.stop - columns.start))
    assert max(areas) == (8, 12) and min(a for a, _ in areas) < 8
