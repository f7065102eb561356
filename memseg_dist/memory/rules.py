"""How a row of a memory takes what a step proposed for it.

A rule is a pure function of one step's events and of the rows they go to; it knows no rank and no
layout. For each event it gives the row as it stands after all of the step's events; a row that was
never written takes the first one as it is.

Shape letters: E events in (slot, row) order, D values of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memseg_dist.batch import Clock

Schedule = Callable[[Clock], float]


@dataclass(frozen=True)
class Events:
    """One step's events.

    old_ED: the row that each event goes to, before the step; is_new_E: it was never written.
    same_EE: bool, [i, j]: event j is written, to the row that event i goes to.
    """

    old_ED: Tensor
    is_new_E: Tensor
    values_ED: Tensor
    weight_E: Tensor
    same_EE: Tensor
    clock: Clock

    def meeting(self, values_ED: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the events of a row meet, [E]: at its first written one; where each goes, [E]:
        what is not written to a spare place, E; and zeros for what comes there, [E + 1, D].
        """
        num_events = len(values_ED)
        meets_E = self.same_EE.int().argmax(dim=1)
        from_E = torch.where(self.same_EE.diagonal(), meets_E, num_events)
        return meets_E, from_E, values_ED.new_zeros(num_events + 1, values_ED.shape[1])

    def sum_of_row(self, values_ED: Tensor) -> Tensor:
        """[E, D]: of each event, the sum over the written events of its row.

        On CPU in the order of the events, whatever other rows a rank has events of. A product keeps
        CUDA free of atomics, whose order is none; in double it is free of TF32.
        """
        if values_ED.device.type != "cpu":
            return (self.same_EE.double() @ values_ED.double()).to(values_ED.dtype)
        meets_E, from_E, sums = self.meeting(values_ED)
        return sums.index_add_(0, from_E, values_ED)[meets_E]


class Rule:
    """Base of the rules. Only what the last written event of a row gives is kept."""

    def writes(self, weight_E: Tensor, is_new_E: Tensor, clock: Clock) -> Tensor:
        """bool [E]: which events are written. An event of weight 0 is not."""
        return weight_E > 0

    def __call__(self, events: Events) -> Tensor:
        """[E, D]: the row of each event after the step."""
        raise NotImplementedError


class Overwrite(Rule):
    """The last event of a row replaces it."""

    def __call__(self, events: Events) -> Tensor:
        return events.values_ED


class Momentum(Rule):
    """m <- keep m + (1 - keep) f, one event after another (Eq. 3 of RCA).

    keep: in 0..1, or a schedule. ValueError for a number outside.
    """

    def __init__(self, keep: float | Schedule = 0.99) -> None:
        self.keep = _share(keep, "keep")

    def __call__(self, events: Events) -> Tensor:
        """n events of one row at once: m <- k^n m + sum_j (1 - k) k^(n - 1 - j) f_j."""
        keep, same_EE, values_ED = self.keep(events.clock), events.same_EE, events.values_ED
        # by table: a vectorised power may round by its place among the events of this rank
        powers = torch.from_numpy(keep ** np.arange(len(values_ED) + 1))
        powers = powers.to(values_ED.device, values_ED.dtype, non_blocking=True)
        before_E, after_E = same_EE.tril(-1).sum(dim=1), same_EE.triu(1).sum(dim=1)
        share_E, is_copied_E = powers[after_E], events.is_new_E & (before_E == 0)
        share_E = torch.where(is_copied_E, share_E, (1 - keep) * share_E)
        kept_E = torch.where(events.is_new_E, 0.0, powers[same_EE.sum(dim=1)])
        came_ED = events.sum_of_row(share_E[:, None] * values_ED)
        return kept_E[:, None] * events.old_ED + came_ED


class Maximum(Rule):
    """The greatest value at each place, of what was and what came (OAA).

    fill_from: from this step on, rows that no earlier step has written take what comes, even with
    weight 0. For layouts in which an event names its row: rings take no turn for such events.
    """

    def __init__(self, fill_from: int | None = None) -> None:
        self.fill_from = fill_from

    def writes(self, weight_E: Tensor, is_new_E: Tensor, clock: Clock) -> Tensor:
        is_filling = self.fill_from is not None and clock.step >= self.fill_from
        return (weight_E > 0) | is_new_E if is_filling else weight_E > 0

    def __call__(self, events: Events) -> Tensor:
        meets_E, from_E, came = events.meeting(events.values_ED)
        from_ED = from_E[:, None].expand_as(events.values_ED)
        came.scatter_reduce_(0, from_ED, events.values_ED, "amax", include_self=False)
        came_ED = came[meets_E]
        return torch.where(events.is_new_E[:, None], came_ED, torch.maximum(came_ED, events.old_ED))


class WeightedMean(Rule):
    """m <- (1 - momentum) m + momentum T, T = (sum of values) / (sum of weights) over a step.

    An event's values are a weighted sum and its weight is the sum of those weights, so that T is
    one mean over all slots. momentum: the share of T, in 0..1, or a schedule (MCIBI's is `poly`).
    """

    def __init__(self, momentum: float | Schedule) -> None:
        self.momentum = _share(momentum, "momentum")

    def __call__(self, events: Events) -> Tensor:
        momentum, tiny = self.momentum(events.clock), torch.finfo(events.weight_E.dtype).tiny
        weight_E1 = events.sum_of_row(events.weight_E[:, None]).clamp_min(tiny)
        mean_ED = events.sum_of_row(events.values_ED) / weight_E1
        blended_ED = (1 - momentum) * events.old_ED + momentum * mean_ED
        return torch.where(events.is_new_E[:, None], mean_ED, blended_ED)


def poly(start: float, power: float = 0.9, floor: float = 0.01) -> Schedule:
    """From `start` at step 0 to `floor` times that at the run's end, (1 - t / T)^power in between.

    ValueError at a clock that does not know the length of the run.
    """

    def at(clock: Clock) -> float:
        if clock.num_steps < 1:
            raise ValueError(
                "a schedule over the run needs Clock.num_steps, which is "
                f"{clock.num_steps} at step {clock.step}; give the clock the steps of the run"
            )
        left = max(0.0, 1 - clock.step / clock.num_steps) ** power
        return left * (start - start * floor) + start * floor

    return at


def _share(value: float | Schedule, name: str) -> Schedule:
    if callable(value):
        return value
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must lie in 0..1")
    return lambda clock: value
