"""Checks of a settings class when it is built: ValueErrors with key, value and what it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def require(is_fine: object, key: str, value: Any, wanted: str) -> None:
    if not is_fine:
        raise ValueError(f"{key} is {value!r}; it must be {wanted}")


def check_numbers(
    settings: Any,
    section: str = "",
    *,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """Fields that must be above 0, at least 0, or from 0 to 1; a field that is None is fine.

    section: the dotted key of `settings`, with its last dot ("optimizer.").
    """
    for name in (*positive, *not_negative, *shares):
        value, key = getattr(settings, name), section + name
        if value is None:
            continue
        require(name not in positive or value > 0, key, value, "above 0")
        require(name not in not_negative or value >= 0, key, value, "0 or more")
        require(name not in shares or 0 <= value <= 1, key, value, "from 0 to 1")


def check_scales(scales: Sequence[float], key: str) -> None:
    """Sizes of a picture to look at, relative to its own."""
    is_fine = len(scales) > 0 and all(0 < scale < math.inf for scale in scales)
    require(is_fine, key, scales, "one or more finite numbers above 0")


def check_pairs(pairs: Sequence[Sequence[object]], key: str) -> None:
    """Pairs of classes that a mirror turns into each other."""
    classes = [item for pair in pairs for item in pair]
    is_fine = all(len(pair) == 2 for pair in pairs) and len(set(classes)) == len(classes)
    require(is_fine, key, pairs, "pairs of two different classes, each class in one pair at most")
