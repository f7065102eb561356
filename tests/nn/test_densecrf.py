"""The lattice filter and the CRF on it against exact sums over all pairs of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference.densecrf import dense_crf_exact, gaussian_kernel

from memseg_dist.nn.densecrf import CrfConfig, dense_crf, kernel_features
from memseg_dist.nn.permutohedral import Lattice, _simplices

SIZE = (32, 40)


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth colours with noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)
    return (smooth + 8 * rng.normal(size=smooth.shape)).clip(0, 255).astype(np.uint8)


def guesses(seed: int, num_classes: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    coarse = torch.rand(1, num_classes, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bilinear")[0].square().numpy()


def symmetric(apply, values: torch.Tensor) -> torch.Tensor:
    scale = apply(torch.ones(len(values), 1)).rsqrt()
    return scale * apply(scale * values)


def relative_errors(features: torch.Tensor) -> torch.Tensor:
    values = torch.rand(len(features), 2, generator=torch.Generator().manual_seed(0))
    kernel = gaussian_kernel(features)
    exact = symmetric(lambda x: kernel @ x, values)
    return (symmetric(Lattice(features).filter, values) - exact).abs() / exact


@pytest.mark.parametrize(
    ("dim", "mean", "largest"), [(1, 0.006, 0.04), (2, 0.008, 0.06), (5, 0.025, 0.25)]
)
def test_filter_is_close_to_the_exact_sum(dim, mean, largest):
    """Relative errors; measured: means 0.004, 0.005, 0.015; largest 0.022, 0.032, 0.156."""
    generator = torch.Generator().manual_seed(dim)
    errors = relative_errors(torch.randn(1000, dim, generator=generator))
    assert errors.mean() < mean and errors.max() < largest


@pytest.mark.parametrize("seed", range(3))
def test_filter_on_pictures(seed):
    """Measured: position mean 0.005, largest 0.027; with colour mean 0.021, largest 0.19."""
    tolerances = ((0.008, 0.05), (0.035, 0.3))
    for features, (mean, largest) in zip(kernel_features(picture(seed), CrfConfig()), tolerances):
        errors = relative_errors(features)
        assert errors.mean() < mean and errors.max() < largest


def test_every_point_lies_in_its_simplex():
    points = 7 * torch.randn(3000, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    corners, weights = _simplices(points)
    assert weights.min() > -1e-6
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3000))
    whole = torch.cat([corners, -corners.sum(dim=2, keepdim=True)], dim=2)
    assert (whole % 6 == torch.arange(6)[None, :, None]).all()  # corner r has remainder r


def test_far_points_do_not_meet():
    filtered = Lattice(torch.tensor([[0.0, 0.0], [0.0, 0.1], [1e4, -1e4]])).filter(
        torch.tensor([[1.0], [1.0], [0.0]])
    )
    assert filtered[2] == 0 and filtered[0] > 0.5


def test_filter_refuses_what_it_cannot_number():
    with pytest.raises(ValueError, match=r"larger.*standard deviations"):
        Lattice(1e15 * torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"\[points, dimensions\], got \(0, 2\)"):
        Lattice(torch.zeros(0, 2))


@pytest.mark.parametrize("seed", range(3))
def test_labels_agree_with_the_exact_crf(seed):
    """Measured: 0.978 to 0.986 of the labels agree; marginals differ by 0.016 on average."""
    image, probabilities = picture(seed), guesses(seed)
    fast, exact = dense_crf(image, probabilities), dense_crf_exact(image, probabilities)
    assert (exact.argmax(axis=0) != probabilities.argmax(axis=0)).mean() > 0.1  # it does something
    assert (fast.argmax(axis=0) == exact.argmax(axis=0)).mean() > 0.95
    assert np.abs(fast - exact).mean() < 0.04
    for marginals in (fast, exact):
        assert marginals.dtype == np.float32 and marginals.shape == probabilities.shape
        np.testing.assert_allclose(marginals.sum(axis=0), 1, atol=1e-5)


def test_noise_is_cleaned_up_to_the_edge():
    """Two colours, slanted edge: a third of the pixels start wrong, nearly none stay so."""
    row, column = np.indices((60, 70))
    truth = (column + 0.4 * row > 45).astype(int)
    rng = np.random.default_rng(0)
    image = np.array([[180, 90, 60], [60, 130, 190]])[truth] + rng.integers(-9, 10, (60, 70, 3))
    wrong = rng.random(truth.shape) < 0.33
    foreground = np.where(truth.astype(bool) != wrong, 0.6, 0.4)
    marginals = dense_crf(image.astype(np.uint8), np.stack([1 - foreground, foreground]))
    assert (marginals.argmax(axis=0) == truth).mean() > 0.995


def test_without_iterations_or_kernels_nothing_moves():
    image, probabilities = picture(0), guesses(0)
    plain = probabilities.clip(1e-5)
    plain = plain / plain.sum(axis=0)
    for config in (CrfConfig(iterations=0), CrfConfig(gaussian_compat=0, bilateral_compat=0)):
        np.testing.assert_allclose(dense_crf(image, probabilities, config), plain, atol=1e-5)


def test_an_impossible_class_may_come_back_and_one_class_is_certain():
    image = picture(1)
    marginals = dense_crf(image, np.zeros((2, *SIZE)))
    np.testing.assert_allclose(marginals, 0.5, atol=1e-5)
    assert (dense_crf(image, np.zeros((1, *SIZE))) == 1).all()


def test_it_is_deterministic_and_takes_any_size():
    for size in ((1, 1), (1, 9), (13, 4)):
        image, probabilities = picture(2, size), guesses(2, 2, size)
        first = dense_crf(image, probabilities)
        assert np.array_equal(first, dense_crf(image, probabilities)) and first.shape[1:] == size


def test_what_is_refused():
    image = picture(0)
    for bad in (guesses(0, size=SIZE[::-1]), guesses(0)[0], guesses(0) - 1, guesses(0) * np.nan,
                guesses(0)[:0]):  # fmt: skip
        with pytest.raises(ValueError, match="probabilities"):
            dense_crf(image, bad)
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float64"):
        dense_crf(image / 255, guesses(0))
    with pytest.raises(ValueError, match=r"crf.bilateral_srgb is 0"):
        CrfConfig(bilateral_srgb=0)
    with pytest.raises(ValueError, match=r"crf.iterations is -1"):
        CrfConfig(iterations=-1)
