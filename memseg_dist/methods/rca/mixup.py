"""Region mixup: which regions of a global batch are mixed, and how much (RCA, Eq. 5, 6).

A plan is made on the host from labels alone and is the same on every rank.

Shape letters: G regions of the global batch, in (slot, row) order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

MixupPair = Literal["other_class", "any"]


class MixupPlan(NamedTuple):
    """Region g becomes omega[g] f[g] + (1 - omega[g]) f[partner[g]]; unmixed: its own partner."""

    partner: np.ndarray
    omega: np.ndarray


def plan_mixup(
    class_G: np.ndarray,
    image_G: np.ndarray,
    *,
    beta: float,
    seed: int,
    pair: MixupPair = "other_class",
) -> MixupPlan:
    """A partner for every region, drawn uniformly; omega ~ Beta(beta, beta), one draw per region.

    pair "other_class": of another image and another class (the paper); a region that finds none
    stays unmixed. "any": any region of the batch, itself included (the code).
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    count = len(class_G)
    preference_GG = generator.random((count, count))
    omega_G = generator.beta(beta, beta, count) if count else np.empty(0)
    if pair == "other_class":
        is_other_GG = (class_G[:, None] != class_G) & (image_G[:, None] != image_G)
        preference_GG = np.where(is_other_GG, preference_GG, -1.0)
    if count == 0:
        return MixupPlan(np.empty(0, np.int64), omega_G)
    partner_G = preference_GG.argmax(axis=1)
    alone_G = preference_GG.max(axis=1) < 0
    own_G = np.arange(count)
    return MixupPlan(np.where(alone_G, own_G, partner_G), np.where(alone_G, 1.0, omega_G))


def no_mixup(count: int) -> MixupPlan:
    return MixupPlan(np.arange(count), np.ones(count))
