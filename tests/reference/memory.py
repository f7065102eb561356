"""A memory as a dictionary of rows, moved event after event: the yardstick of the tests.

One process, no layout object, no tensor operation over events. Nothing here is used in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from memseg_dist.batch import Clock

Key = tuple[int, int]
"""(class, image), or (class, position in the ring)."""


class Memory:
    """rows, updates and origin (step, slot, row) by key; `dropped` events had no row.

    capacity: rings of so many rows for the classes in `keys`; None: a row for each (class, image)
    in `keys`. fill_from: from this step on, rows that no earlier step wrote take what comes.
    """

    def __init__(
        self, rule: Callable, keys: Iterable, capacity: int | None, fill_from: int | None = None
    ) -> None:
        self.rule, self.keys, self.capacity, self.fill_from = rule, set(keys), capacity, fill_from
        self.rows: dict[Key, Tensor] = {}
        self.updates: dict[Key, int] = {}
        self.origin: dict[Key, tuple[int, int, int]] = {}
        self.writes: dict[int, int] = {}
        self.dropped = 0

    def step(self, events: Iterable, clock: Clock) -> None:
        """events: (slot, row, class, image, value, weight), in the order of slots and rows."""
        taken: dict[Key, list] = {}
        for slot, row, class_id, image, value, weight in events:
            key = (class_id, image)
            if self.capacity is not None:
                key = (class_id, self.writes.get(class_id, 0) % self.capacity)
            if (key if self.capacity is None else class_id) not in self.keys:
                self.dropped += 1
                continue
            fills = self.fill_from is not None and clock.step >= self.fill_from
            if weight <= 0 and not (fills and key not in self.rows):
                continue
            taken.setdefault(key, []).append((value, weight))
            self.updates[key] = self.updates.get(key, 0) + 1
            self.origin[key] = (clock.step, slot, row)
            self.writes[class_id] = self.writes.get(class_id, 0) + 1
        for key, of_row in taken.items():
            self.rows[key] = self.rule(self.rows.get(key), of_row, clock)


def overwrite(old: Tensor | None, events: list, clock: Clock) -> Tensor:
    return events[-1][0]


def momentum(keep: Callable[[Clock], float]) -> Callable:
    def rule(old: Tensor | None, events: list, clock: Clock) -> Tensor:
        for value, _ in events:
            old = value if old is None else keep(clock) * old + (1 - keep(clock)) * value
        assert old is not None
        return old

    return rule


def maximum(old: Tensor | None, events: list, clock: Clock) -> Tensor:
    for value, _ in events:
        old = value if old is None else torch.maximum(old, value)
    assert old is not None
    return old


def weighted_mean(share: Callable[[Clock], float]) -> Callable:
    def rule(old: Tensor | None, events: list, clock: Clock) -> Tensor:
        mean = sum(value for value, _ in events) / sum(weight for _, weight in events)
        return mean if old is None else (1 - share(clock)) * old + share(clock) * mean

    return rule


def annealed(start: float) -> Callable[[Clock], float]:
    """m_t = (1 - t / T)^0.9 (m_0 - m_0 / 100) + m_0 / 100 (MCIBI)."""
    return lambda clock: (
        (1 - clock.step / clock.num_steps) ** 0.9 * (start - start / 100) + start / 100
    )
