"""The fully connected CRF with exact kernel sums, O(N^2): the yardstick of the tests."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.nn.densecrf import CrfConfig, check_sizes, kernel_features, mean_field


def dense_crf_exact(
    image: NDArray[np.uint8], probabilities: NDArray[np.floating], config: CrfConfig | None = None
) -> NDArray[np.float32]:
    """`dense_crf` with every pair of pixels visited; N^2 floats are held per kernel."""
    config = config or CrfConfig()
    check_sizes(image, probabilities)
    gaussian, bilateral = (gaussian_kernel(f) for f in kernel_features(image, config))
    kernels = [
        (config.gaussian_compat, lambda values: gaussian @ values),
        (config.bilateral_compat, lambda values: bilateral @ values),
    ]
    return mean_field(probabilities, kernels, config.iterations)


def gaussian_kernel(features: Tensor) -> Tensor:
    """exp(-|f_i - f_j|^2 / 2) of the points [N, d]: [N, N]."""
    return torch.exp(-0.5 * torch.cdist(features, features).square())
