"""Gaussian filtering of scattered points in a few dimensions, in time linear in their number.

    lattice = Lattice(features_Nd)             # features in units of the standard deviation
    blurred_NC = lattice.filter(values_NC)     # ~ sum_j exp(-|f_i - f_j|^2 / 2) values_j

A. Adams, J. Baek, M. Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
Eurographics 2010. The points are embedded in the hyperplane of R^(d+1) whose coordinates add up to
0 and given to the d + 1 corners of the lattice simplex around them ("splat"), the corners are
blurred along the d + 1 lattice directions, and every point reads its corners back ("slice").

Deviations from the paper:
1. Corners live in one sorted array of integer keys, not in a hash table, and a neighbour is found
   by adding a constant to its key and searching: all is array arithmetic.
2. The neighbours of the corners that points use are in use as well, so that what is blurred across
   a gap is not lost: on photographs the largest errors shrink two to eight times, the mean by a
   quarter, at little cost.

Shape letters: N points, d dimensions, V = d + 1 corners per point, M corners in use, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_KEYS = 2**62


class Lattice:
    """Gaussian of standard deviation 1 over the points `features` [N, d], up to one factor.

    The result is a few per cent off the exact sum (see `tests/nn/test_densecrf.py`), and
    the factor drops out wherever it is divided by the filtered ones. ValueError for points that
    span more than 2^62 lattice cells.
    """

    def __init__(self, features: Tensor) -> None:
        if features.dim() != 2 or 0 in features.shape:
            raise ValueError(f"features must be [points, dimensions], got {tuple(features.shape)}")
        corners_NVd, self._weights_NV = _simplices(features.double())
        keys_NV, shifts_V = _pack(corners_NVd)
        touched = torch.unique(keys_NV)
        neighbours = [touched + sign * int(shift) for shift in shifts_V for sign in (1, -1)]
        keys_M = torch.unique(torch.cat([touched, *neighbours]))
        corner = torch.searchsorted(keys_M, keys_NV.flatten())
        self._corner_NV = corner.view_as(keys_NV)
        self._num_corners = len(keys_M)
        self._next_VM = torch.stack([_find(keys_M, keys_M + int(shift)) for shift in shifts_V])
        self._previous_VM = torch.stack([_find(keys_M, keys_M - int(shift)) for shift in shifts_V])
        # The same incidence seen from the corners: which points each one gathers, and how much.
        order = corner.argsort(stable=True)
        self._point = order // keys_NV.shape[1]
        self._point_weight = self._weights_NV.flatten()[order]
        counts_M = torch.bincount(corner, minlength=self._num_corners)
        self._first_M = counts_M.cumsum(0) - counts_M

    def filter(self, values: Tensor) -> Tensor:
        """float32 [N, C] -> [N, C]."""
        corners_MC = F.embedding_bag(
            self._point, values, self._first_M, mode="sum", per_sample_weights=self._point_weight
        )
        # One more row, always zero: the neighbour that is not in use.
        corners_MC = F.pad(corners_MC, (0, 0, 0, 1))
        for next_M, previous_M in zip(self._next_VM, self._previous_VM, strict=True):
            corners_MC[:-1] += 0.5 * (corners_MC[next_M] + corners_MC[previous_M])
        return F.embedding_bag(
            self._corner_NV, corners_MC, mode="sum", per_sample_weights=self._weights_NV
        )


def _simplices(features_Nd: Tensor) -> tuple[Tensor, Tensor]:
    """Per point the corners of its simplex, int64 [N, V, d] (the last of the d + 1 coordinates is
    minus the sum of the others), and its barycentric weights in them, float32 [N, V].
    """
    elevated_NV = _elevate(features_Nd)
    num = elevated_NV.shape[1]
    # The nearest point of the sublattice of multiples of d + 1, moved back onto the hyperplane.
    nearest_NV = (elevated_NV / num).round()
    excess_N1 = nearest_NV.sum(dim=1, keepdim=True).long()
    offset_NV = elevated_NV - num * nearest_NV
    rank_NV = offset_NV.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + excess_N1
    wrapped_NV = (rank_NV < 0).long() - (rank_NV >= num).long()
    rank_NV += num * wrapped_NV
    base_NV = num * (nearest_NV.long() + wrapped_NV)
    # Offsets from that corner in descending order: their differences are the weights.
    sorted_NV = torch.zeros_like(elevated_NV).scatter_(1, rank_NV, elevated_NV - base_NV) / num
    weights_NV = torch.empty_like(sorted_NV)
    weights_NV[:, 1:] = (sorted_NV[:, :-1] - sorted_NV[:, 1:]).flip(1)
    weights_NV[:, 0] = 1 + sorted_NV[:, -1] - sorted_NV[:, 0]
    remainder_V1 = torch.arange(num)[:, None]
    is_wrapped_VV = torch.arange(num)[None] > num - 1 - remainder_V1
    canonical_VV = remainder_V1 - num * is_wrapped_VV  # [remainder, rank]
    corners_NVd = base_NV[:, None, :-1] + canonical_VV.T[rank_NV[:, :-1]].transpose(1, 2)
    return corners_NVd, weights_NV.float()


def _elevate(features_Nd: Tensor) -> Tensor:
    """[N, d] -> [N, d + 1] on the hyperplane, scaled so that blurring has unit deviation."""
    dim = features_Nd.shape[1]
    axis = torch.arange(dim, dtype=features_Nd.dtype)
    scale_d = math.sqrt(2 / 3) * (dim + 1) / ((axis + 1) * (axis + 2)).sqrt()
    basis_dV = torch.ones(dim, dim + 1, dtype=features_Nd.dtype).tril()
    basis_dV[torch.arange(dim), torch.arange(1, dim + 1)] = -(axis + 1)
    return (features_Nd * scale_d) @ basis_dV


def _pack(corners_NVd: Tensor) -> tuple[Tensor, Tensor]:
    """Corners as integers [N, V], and what one step along each lattice direction adds to them, [V].

    Packing is linear, so a step is one constant; a margin keeps two steps from wrapping round.
    """
    dim = corners_NVd.shape[2]
    low_d = corners_NVd.amin(dim=(0, 1)) - 2 * (dim + 1)
    span_d = corners_NVd.amax(dim=(0, 1)) + 2 * (dim + 1) - low_d + 1
    if math.prod(span_d.tolist()) > MAX_KEYS:
        raise ValueError(
            f"the points span {span_d.tolist()} lattice cells, too many to number; use larger "
            "standard deviations"
        )
    stride_d = torch.cat([span_d.new_ones(1), span_d[:-1].cumprod(0)])
    step_Vd = torch.ones(dim + 1, dim, dtype=torch.int64)
    step_Vd[:dim] -= (dim + 1) * torch.eye(dim, dtype=torch.int64)
    return ((corners_NVd - low_d) * stride_d).sum(dim=2), (step_Vd * stride_d).sum(dim=1)


def _find(keys_M: Tensor, wanted: Tensor) -> Tensor:
    """Positions of `wanted` in the ascending `keys_M`; M for those that are not there."""
    place = torch.searchsorted(keys_M, wanted)
    found = keys_M[place.clamp(max=len(keys_M) - 1)] == wanted
    return torch.where(found, place, len(keys_M))
