"""The ring: each class keeps its last M events, first in first out.

A pure update rule over rows that somebody else holds: no rank, no communication. LarvSeg's event is
the mean of one image's top-K pixel features, and what the method reads is the mean over the ring,
which equals the paper's mean over M * K stored pixels exactly.

Shape letters: C classes held here, M capacity, D channels, E events.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def ring_positions(
    class_E: np.ndarray, total_C: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where events go that arrive in this order: (ring position [E], survives [E]).

    total_C counts all the events that a class has had before these. Of more than `capacity` events
    of one class only the last survive, so no position is written twice.
    """
    order = np.argsort(class_E, kind="stable")
    ordered = class_E[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else ordered
    lengths = np.diff(np.r_[starts, len(ordered)])
    nth = np.empty(len(ordered), dtype=np.int64)  # how many of the class came before, in this call
    nth[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    arriving = np.empty_like(nth)
    arriving[order] = np.repeat(lengths, lengths)
    return (total_C[class_E] + nth) % capacity, nth >= arriving - capacity


def ring_means(rows_CMD: Tensor, total_C: Tensor) -> Tensor:
    """Mean of the filled part of each ring, fp32 [C, D]; zero for a class without events."""
    capacity = rows_CMD.shape[1]
    filled_C = total_C.clamp(max=capacity)
    is_filled_CM = torch.arange(capacity, device=rows_CMD.device) < filled_C[:, None]
    kept_CMD = torch.where(is_filled_CM[:, :, None], rows_CMD.float(), 0.0)
    return kept_CMD.sum(dim=1) / filled_C.clamp_min(1)[:, None]
