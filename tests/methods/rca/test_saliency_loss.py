"""The saliency loss against its definition in loops, value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memseg_dist.methods.rca.saliency_loss import saliency_loss

DOUBLE = torch.float64
STRIDE = 3


def in_loops(logits, labels, saliency, tau, weight):
    total, count = torch.zeros((), dtype=logits.dtype), 0
    num_images, height, width = saliency.shape
    whole = [STRIDE * positions for positions in logits.shape[-2:]]
    share = F.interpolate(logits.softmax(dim=1), whole, mode="bilinear", align_corners=False)
    num_agreeing = 0
    for b in range(num_images):
        present = [c for c in range(labels.shape[1]) if labels[b, c]]
        agreeing = []
        for c in present:
            covered = overlap = 0
            for y in range(height):
                for x in range(width):
                    if saliency[b, y, x] >= 0 and share[b, c, y, x] > 0.5:
                        covered += 1
                        overlap += bool(saliency[b, y, x] > 0.5)
            if covered and overlap / covered > tau:
                agreeing.append(c)
        num_agreeing += len(agreeing)
        for y in range(height):
            for x in range(width):
                if saliency[b, y, x] < 0:
                    continue
                fg = sum(share[b, c, y, x] for c in agreeing)
                bg = share[b, -1, y, x]
                bg = bg + sum(share[b, c, y, x] for c in present if c not in agreeing)
                estimate = weight * fg + (1 - weight) * (1 - bg)
                total = total + (estimate - saliency[b, y, x]) ** 2
                count += 1
    return total / max(count, 1), num_agreeing


def example(seed: int = 0):
    """Saliency of no whole positions, with unknown pixels; per image two present classes that show,
    not all salient.
    """
    torch.manual_seed(seed)
    logits = torch.randn(3, 5, 4, 5, dtype=DOUBLE)
    labels = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    logits[0, 0, :, :2] += 6
    logits[0, 1, :, 3:] += 6
    logits[1, 1, :2] += 6
    saliency = torch.rand(3, 11, 13, dtype=DOUBLE)
    saliency[0, :, 7:] *= 0.4
    saliency[0, :, :6] = saliency[0, :, :6].clamp_min(0.6)
    saliency[:, 9:] = -1
    return logits.requires_grad_(), labels, saliency


@pytest.mark.parametrize("tau, weight", [(0.4, 0.5), (0.4, 0.9), (0.0, 0.5), (1.0, 0.3)])
def test_equals_the_loops_in_value_and_gradient(tau, weight):
    logits, labels, saliency = example()
    got = saliency_loss(logits, labels, saliency, stride=STRIDE, tau=tau, foreground_weight=weight)
    expected, num_agreeing = in_loops(logits, labels, saliency, tau, weight)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits), rtol=0, atol=1e-12
    )
    if tau == 0.4:
        assert 0 < num_agreeing < labels.sum(), "both sides must be tried"


def test_absent_classes_and_unknown_pixels():
    logits, labels, saliency = example()
    with_other_values = saliency.masked_fill(saliency < 0, -7.0)
    one, other = (
        saliency_loss(logits, labels, maps, stride=STRIDE) for maps in (saliency, with_other_values)
    )
    assert torch.equal(one, other)
    nothing_known = torch.full_like(saliency, -1.0)
    loss = saliency_loss(logits, labels, nothing_known, stride=STRIDE)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_perfect_maps_cost_nothing():
    saliency = torch.zeros(1, 6, 6)
    saliency[:, :, :3] = 1
    logits = torch.zeros(1, 3, 6, 6)
    logits[:, 1] = 40 * saliency
    logits[:, 2] = 40 * (1 - saliency)
    labels = torch.tensor([[False, True]])
    assert saliency_loss(logits, labels, saliency, stride=1).item() < 1e-9


def test_a_missing_background_channel_is_named():
    with pytest.raises(ValueError, match="4 channels for 4 classes; give 5, the background last"):
        logits, labels = torch.zeros(1, 4, 2, 2), torch.ones(1, 4).bool()
        saliency_loss(logits, labels, torch.zeros(1, 4, 4), stride=2)
