"""T of Eq. 8 - 10 without enlarging the features, as sums that any number of slots may add up.

The paper enlarges R to the size of the image and takes, for each class, the mean of its pixels
weighted by 1 - cos(r_p, M_c). Enlarging is linear, r_p = sum_j u_pj f_j over the 4 corners j of
the pixel's cell, so

    <r_p, M_c> = sum_j u_pj <f_j, M_c>                      maps [K, N] at low resolution
    |r_p|^2    = sum_ij u_pi u_pj <f_i, f_j>                5 maps [N]: itself and its neighbours
    sum_p w_p r_p = sum_j (sum_p w_p u_pj) f_j              a map [K, N] of weights

Beside [K, N] nothing is larger than a few numbers per pixel of one image, and nothing waits for the
device. On CUDA `index_add_` adds in no fixed order: sums agree to rounding from run to run.

Shape letters: B images, C channels, K classes, H x W pixels, P of one image, h x w positions, N of
one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE

Weighting = Literal["cosine", "plain"]
EPS = 1e-6
"""Added to the weight 1 - cos, which is 0 for a single pixel that equals its class's vector."""


class Corner(NamedTuple):
    """One of the 4 positions that a pixel is interpolated from: its index in N, and its share."""

    index_P: Tensor
    share_P: Tensor


@torch.no_grad()
def class_sums(
    features_BChw: Tensor,
    target_BHW: Tensor,
    memory_KC: Tensor,
    is_set_K: Tensor,
    *,
    weighting: Weighting = "cosine",
    random_pixel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per class, the sum of w_p r_p over its pixels [K, C] and that of w_p [K], 0 for no pixels.

    target: class of each pixel, 0 .. K - 1, or IGNORE. w_p is 1 - cos(r_p, M_c) + EPS ("cosine") or
    1 ("plain"). For a class without a vector it is 1, or with `random_pixel` 1 for one pixel drawn
    from torch's generator and 0 for the others. For the T of one slot divide the two.
    """
    num_classes, (height, width) = len(memory_KC), features_BChw.shape[-2:]
    first_BHW = target_BHW != IGNORE
    if random_pixel:
        first_BHW = _one_per_class(target_BHW, num_classes)
    direction_KC = F.normalize(memory_KC, dim=1)
    corners = bilinear_corners((height, width), target_BHW.shape[1:], features_BChw)
    sums_KC, sums_K = torch.zeros_like(memory_KC), torch.zeros_like(memory_KC[:, 0])
    for features_Chw, target_HW, first_HW in zip(features_BChw, target_BHW, first_BHW):
        features_CN, target_P = features_Chw.flatten(1), target_HW.flatten()
        class_P, weight_P = target_P.clamp_min(0), first_HW.flatten().to(features_CN.dtype)
        start_P = class_P * (height * width)
        if weighting == "cosine":
            dots_X = (direction_KC @ features_CN).flatten()
            dot_P = sum(share * dots_X[start_P + index] for index, share in corners)
            cosine_P = dot_P / squared_norms(features_Chw, corners).sqrt().clamp_min(1e-12)
            # rounding may put a cosine above 1
            far_P = ((1 - cosine_P).clamp_min(0) + EPS) * (target_P != IGNORE)
            weight_P = torch.where(is_set_K[class_P], far_P, weight_P)
        elif random_pixel:
            known_P = (target_P != IGNORE).to(weight_P.dtype)
            weight_P = torch.where(is_set_K[class_P], known_P, weight_P)
        weight_X = features_CN.new_zeros(num_classes * height * width)
        for index, share in corners:
            weight_X.index_add_(0, start_P + index, weight_P * share)
        weight_KN = weight_X.view(num_classes, -1)
        sums_KC += weight_KN @ features_CN.T
        sums_K += weight_KN.sum(dim=1)
    return sums_KC, sums_K


def bilinear_corners(
    low_size: Sequence[int], size: Sequence[int], like: Tensor
) -> tuple[Corner, Corner, Corner, Corner]:
    """Top left, top right, bottom left, bottom right of each pixel of an enlargement from
    `low_size` to `size` (bilinear, align_corners=False). A neighbour outside has the share 0.
    """
    top_H, down_H = _lower_neighbour(low_size[0], size[0], like)
    left_W, right_W = _lower_neighbour(low_size[1], size[1], like)
    bottom_H = (top_H + 1).clamp_max(low_size[0] - 1)
    next_W = (left_W + 1).clamp_max(low_size[1] - 1)
    rows = ((top_H, 1 - down_H), (bottom_H, down_H))
    columns = ((left_W, 1 - right_W), (next_W, right_W))
    return tuple(  # type: ignore[return-value]
        Corner(
            (row_H[:, None] * low_size[1] + column_W).flatten(),
            (vertical_H[:, None] * horizontal_W).flatten(),
        )
        for row_H, vertical_H in rows
        for column_W, horizontal_W in columns
    )


def _lower_neighbour(low_length: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Per pixel of an axis the position before its centre, and the share of the one after it."""
    position = torch.arange(length, device=like.device, dtype=torch.float64)
    at = ((position + 0.5) * (low_length / length) - 0.5).clamp(0, low_length - 1)
    before = at.floor()
    return before.long(), (at - before).to(like.dtype)


def squared_norms(features_Chw: Tensor, corners: tuple[Corner, Corner, Corner, Corner]) -> Tensor:
    """|r_p|^2 [P] of the pixels r_p = sum_j u_pj f_j."""
    f, width = features_Chw, features_Chw.shape[-1]

    def inner(one: Tensor, other: Tensor) -> Tensor:
        """At one's position the product with other's; 0 where the neighbour is outside."""
        rows, columns = one.shape[-2:]
        product = (one * other).sum(dim=0)
        return F.pad(product, (0, width - columns, 0, f.shape[-2] - rows)).flatten()

    itself = inner(f, f)
    right, down = inner(f[:, :, :-1], f[:, :, 1:]), inner(f[:, :-1], f[:, 1:])
    falling = inner(f[:, :-1, :-1], f[:, 1:, 1:])  # top left with bottom right
    rising = inner(f[:, :-1, 1:], f[:, 1:, :-1])  # top right with bottom left, at the left column
    (a, u_a), (b, u_b), (c, u_c), (_, u_d) = corners
    squares = sum(share.square() * itself[index] for index, share in corners)
    pairs = (
        u_a * u_b * right[a] + u_c * u_d * right[c] + u_a * u_c * down[a] + u_b * u_d * down[b]
        + u_a * u_d * falling[a] + u_b * u_c * rising[a]
    )  # fmt: skip
    return (squares + 2 * pairs).clamp_min(0)


def _one_per_class(target_BHW: Tensor, num_classes: int) -> Tensor:
    """True at one pixel of each class, drawn uniformly: bool [B, H, W]."""
    draw = torch.rand(target_BHW.shape, dtype=torch.float64, device=target_BHW.device)
    draw_X = torch.where(target_BHW == IGNORE, -1.0, draw).flatten()
    class_X = target_BHW.clamp_min(0).flatten()
    most_K = draw_X.new_full((num_classes,), -1.0).scatter_reduce_(0, class_X, draw_X, "amax")
    return ((draw_X == most_K[class_X]) & (draw_X >= 0)).view(target_BHW.shape)
