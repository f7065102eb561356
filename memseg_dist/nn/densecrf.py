"""Fully connected CRF: class probabilities sharpened along the edges of the picture.

P. Kraehenbuehl, V. Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials", NIPS 2011. Every pair of pixels that takes different labels pays (Potts)

    k(i, j) = compat_g exp(-|p_i - p_j|^2 / (2 sxy_g^2))
            + compat_b exp(-|p_i - p_j|^2 / (2 sxy_b^2) - |I_i - I_j|^2 / (2 srgb^2))

and mean-field iterations give each pixel's marginals: Q_i(c) ~ p_i(c) exp(sum_j k(i, j) Q_j(c)).

Deviations from the paper, as in the authors' later code and its Python wrapper, whose results are
what published settings were tuned on: each kernel K is normalised to D^-1/2 K D^-1/2 with D its row
sums, and the sum over j includes i itself. Kernels are filtered on the permutohedral lattice;
`tests/reference/densecrf.py` computes the same sums exactly.

Shape letters: C classes, H x W pixels, N = H W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.checks import NotNegative, NotNegativeInt, Positive, check_numbers
from memseg_dist.nn.permutohedral import Lattice

Filter = Callable[[Tensor], Tensor]
"""[N, C] -> [N, C], linear."""

SMALLEST = 1e-5
"""Probabilities below count as this, so that no class is impossible from the start."""


@dataclass(frozen=True)
class CrfConfig:
    """The kernels' widths and weights; defaults: those of RCA's label fusion."""

    iterations: NotNegativeInt = 10
    """Mean-field updates of the whole picture."""
    gaussian_sxy: Positive = 3.0
    """Standard deviation of the smoothness kernel in pixels."""
    gaussian_compat: NotNegative = 3.0
    """Weight of the smoothness kernel."""
    bilateral_sxy: Positive = 80.0
    """Standard deviation of the appearance kernel in pixels ..."""
    bilateral_srgb: Positive = 13.0
    """... and in levels of red, green and blue (0..255)."""
    bilateral_compat: NotNegative = 10.0
    """Weight of the appearance kernel."""

    def __post_init__(self) -> None:
        check_numbers(self, "crf.")


DEEPLAB = CrfConfig(gaussian_sxy=1.0, bilateral_sxy=67.0, bilateral_srgb=3.0, bilateral_compat=4.0)
"""For a segmenter's probabilities: DeepLabV2's, with the numbers of OAA's configuration."""


def dense_crf(
    image: NDArray[np.uint8], probabilities: NDArray[np.floating], config: CrfConfig | None = None
) -> NDArray[np.float32]:
    """Marginals of the classes, float32 [C, H, W], adding up to 1 in each pixel.

    image: uint8 [H, W, 3], RGB. probabilities: [C, H, W], 0 or more; each pixel's are divided by
    their sum. On the host, on one or more cores. ValueError for another dtype or size.
    """
    config = config or CrfConfig()
    check_sizes(image, probabilities)
    weights = (config.gaussian_compat, config.bilateral_compat)
    kernels = [
        (compat, Lattice(features).filter)
        for compat, features in zip(weights, kernel_features(image, config))
        if compat > 0
    ]
    return mean_field(probabilities, kernels, config.iterations)


def mean_field(
    probabilities: NDArray[np.floating], kernels: Sequence[tuple[float, Filter]], iterations: int
) -> NDArray[np.float32]:
    """Q <- softmax(log p + sum over kernels of compat * D^-1/2 K D^-1/2 Q), `iterations` times."""
    log_NC = _columns(probabilities).clamp_min(SMALLEST).log()
    scaled = [
        (compat, apply, (apply(torch.ones(len(log_NC), 1)) + 1e-20).rsqrt())
        for compat, apply in kernels
    ]
    q_NC = log_NC.softmax(dim=1)
    for _ in range(iterations):
        logits_NC = log_NC.clone()
        for compat, apply, scale_N1 in scaled:
            logits_NC += compat * scale_N1 * apply(scale_N1 * q_NC)
        q_NC = logits_NC.softmax(dim=1)
    return q_NC.T.reshape(probabilities.shape).numpy()


def kernel_features(image: NDArray[np.uint8], config: CrfConfig) -> tuple[Tensor, Tensor]:
    """Points in units of the deviations: position [N, 2]; position and colour [N, 5]."""
    row, column = np.indices(image.shape[:2], dtype=np.float32)
    place = torch.from_numpy(np.stack([column.ravel(), row.ravel()], axis=1))
    color = torch.from_numpy(image.reshape(-1, 3).astype(np.float32))
    bilateral = torch.cat([place / config.bilateral_sxy, color / config.bilateral_srgb], dim=1)
    return place / config.gaussian_sxy, bilateral


def check_image(image: NDArray[np.generic]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {image.shape}")


def check_sizes(image: NDArray[np.uint8], probabilities: NDArray[np.floating]) -> None:
    """ValueError naming what is wrong."""
    check_image(image)
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"probabilities {probabilities.shape} do not fit the image of {image.shape[0]} x "
            f"{image.shape[1]} pixels; they must be [classes, height, width] at its size"
        )
    if len(probabilities) == 0 or not np.isfinite(probabilities).all() or probabilities.min() < 0:
        raise ValueError(
            f"probabilities {probabilities.shape} must be of one class at least, finite and 0 or "
            "more"
        )


def _columns(probabilities: NDArray[np.floating]) -> Tensor:
    """[C, H, W] -> float32 [N, C], contiguous."""
    flat = probabilities.reshape(len(probabilities), -1).T
    return torch.from_numpy(np.ascontiguousarray(flat, dtype=np.float32))
