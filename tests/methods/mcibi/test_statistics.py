"""The exact T without enlarged features against loops over enlarged pixels (Eq. 8 - 10)."""

from __future__ import annotations

import pytest
import torch
from no_host_sync import no_host_sync, pretended_device
from reference import mcibi as reference

from memseg_dist.batch import IGNORE
from memseg_dist.methods.mcibi.statistics import EPS, bilinear_corners, class_sums, squared_norms

NUM_CLASSES, DIM = 4, 5
SIZES = [(6, 7, 24, 28), (5, 4, 17, 15), (3, 3, 3, 3), (1, 1, 4, 4), (1, 6, 8, 9), (4, 4, 9, 10)]


def drawn(h, w, H, W, dtype=torch.float64):
    """Two images; class 2 has no vector, class 3 is in no mask."""
    torch.manual_seed(h * w)
    features = torch.randn(2, DIM, h, w, dtype=dtype)
    target = torch.randint(-1, NUM_CLASSES - 1, (2, H, W))
    memory = torch.randn(NUM_CLASSES, DIM, dtype=dtype)
    is_set = torch.tensor([True, True, False, True])
    memory[2] = 0
    return features, target, memory, is_set


@pytest.mark.parametrize("weighting", ["cosine", "plain"])
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_equal_the_loops_over_enlarged_pixels(sizes, weighting):
    features, target, memory, is_set = drawn(*sizes)
    sums, weights = class_sums(features, target, memory, is_set, weighting=weighting)
    known = {c: memory[c] for c in range(NUM_CLASSES) if is_set[c]}
    for c in range(NUM_CLASSES):
        pairs = reference.class_weights_and_pixels(
            [*features], [*target], known, c, weighting=weighting
        )
        if not pairs:
            assert weights[c] == 0 and not sums[c].any()
            continue
        torch.testing.assert_close(weights[c], sum(w for w, _ in pairs), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sums[c] / weights[c], reference.transform(pairs))
    assert (target == 2).any() and weights[3] == 0


def test_single_precision_is_good_to_its_rounding():
    features, target, memory, is_set = drawn(6, 7, 24, 28)
    wanted = class_sums(features, target, memory, is_set)
    found = class_sums(features.float(), target, memory.float(), is_set)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_norms_of_enlarged_pixels_from_five_maps(sizes):
    features = drawn(*sizes)[0][0]
    corners = bilinear_corners(sizes[:2], sizes[2:], features)
    wanted = reference.enlarged(features, sizes[2:]).square().sum(dim=0).flatten()
    torch.testing.assert_close(squared_norms(features, corners), wanted)


def test_an_image_without_labels_adds_nothing():
    features, target, memory, is_set = drawn(3, 3, 12, 12)
    for sums in class_sums(features, torch.full_like(target, IGNORE), memory, is_set):
        assert not sums.any()


def test_a_single_pixel_that_equals_its_vector_still_has_a_weight():
    """Eq. 10 would divide 0 by 0."""
    features = torch.randn(1, DIM, 1, 1, dtype=torch.float64)
    target = torch.full((1, 2, 2), IGNORE)
    target[0, 1, 0] = 1
    memory = features[0, :, 0, 0].expand(NUM_CLASSES, DIM)
    sums, weights = class_sums(features, target, memory, torch.ones(NUM_CLASSES).bool())
    torch.testing.assert_close(weights[1], torch.tensor(EPS, dtype=torch.float64))
    torch.testing.assert_close(sums[1] / weights[1], memory[1])


def test_a_zero_pixel_is_as_far_as_a_right_angle():
    features, target = torch.zeros(1, DIM, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)
    memory, is_set = torch.ones(NUM_CLASSES, DIM), torch.ones(NUM_CLASSES).bool()
    weights = class_sums(features, target, memory, is_set)[1]
    torch.testing.assert_close(weights, torch.tensor([16 * (1 + EPS), 0, 0, 0]))


def test_a_random_pixel_is_one_pixel_of_a_class_without_a_vector():
    features, target, memory, is_set = drawn(6, 7, 24, 28)
    torch.manual_seed(0)
    first = class_sums(features, target, memory, is_set, random_pixel=True)
    wanted = class_sums(features, target, memory, is_set)
    for one, other in zip(first, wanted):
        torch.testing.assert_close(one[is_set], other[is_set])
    assert first[1][2] == 1
    pixels = torch.stack([reference.enlarged(image, (24, 28)) for image in features])
    of_class = pixels.permute(0, 2, 3, 1)[target == 2]
    assert torch.isclose(of_class, first[0][2]).all(dim=1).sum() == 1
    torch.manual_seed(1)
    assert not torch.equal(class_sums(features, target, memory, is_set, random_pixel=True)[0][2],
                           first[0][2])  # fmt: skip
    plain = class_sums(features, target, memory, is_set, weighting="plain", random_pixel=True)
    assert plain[1].tolist() == [(target == 0).sum(), (target == 1).sum(), 1, 0]


def test_every_pixel_of_a_class_is_drawn_as_often():
    target, counts = torch.tensor([[[0, 1, 0, IGNORE]]]), torch.zeros(4)
    features = torch.eye(4)[None, :, None]
    torch.manual_seed(0)
    for _ in range(400):
        counts += class_sums(
            features, target, torch.zeros(2, 4), torch.zeros(2).bool(), random_pixel=True
        )[0][0]
    assert counts[1] == counts[3] == 0 and 160 < counts[0] < 240


@pytest.mark.parametrize("random_pixel", [False, True])
def test_it_never_waits_for_the_device(random_pixel):
    with pretended_device() as device:
        features, target, memory, is_set = (
            part.to(device) for part in drawn(6, 7, 24, 28, torch.float32)
        )
        with no_host_sync():
            class_sums(features, target, memory, is_set, random_pixel=random_pixel)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sums_on_a_gpu_are_those_on_the_cpu():
    parts = drawn(6, 7, 24, 28, torch.float32)
    here, there = class_sums(*parts), class_sums(*(part.cuda() for part in parts))
    for one, other in zip(here, there):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-4, atol=1e-4)
