"""How state that is spread over ranks is written down: world-size free.

A checkpoint stores *global* tensors. What a rank holds of one is a `Rows`; a tensor that every
rank holds alike is a plain tensor (rank 0 writes it). Loading asks a reader for the rows that the
new owner needs, so a bank saved by 8 ranks is read back by 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows [start, start + len(tensor)) of a global tensor with `total` rows."""

    tensor: Tensor
    start: int
    total: int


class Reader(Protocol):
    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the global tensor `name`; the whole of it by default."""
        ...


class Stateful(Protocol):
    """What `Method.state()` hands to the checkpoint beside the weights."""

    def state_dict(self) -> dict[str, Rows | Tensor]: ...

    def load_state_dict(self, read: Reader) -> None: ...


class PerClass(NamedTuple):
    """Of each class, [C]: the rows set, the writes ever made, the step of the last one or -1."""

    rows: np.ndarray
    events: np.ndarray
    last_step: np.ndarray
