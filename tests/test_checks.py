"""Every number of the settings that has a bound is held to it."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest

import memseg_dist
from memseg_dist.checks import Bound, PositiveInt, Share, check_numbers

ARGUMENTS = {
    "Source": {"name": "a", "path": "b", "supervision": "masks"},
    "ValidationConfig": {"path": "b"},
}


def bounded() -> Iterator[tuple[type, str]]:
    """Settings classes of the package, with the names of their fields that have a bound."""
    for module in pkgutil.walk_packages(memseg_dist.__path__, "memseg_dist."):
        if module.name.endswith("__main__"):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            is_own = inspect.isclass(kind) and kind.__module__ == module.name
            if is_own and dataclasses.is_dataclass(kind) and kind.__name__ != "RunConfig":
                for name, hint in get_type_hints(kind, include_extras=True).items():
                    parts = [hint, *get_args(hint)]
                    if any(
                        isinstance(b, Bound) for p in parts for b in getattr(p, "__metadata__", ())
                    ):
                        yield kind, name


def test_what_is_out_of_bounds_is_refused():
    found = list(bounded())
    assert len({kind for kind, _ in found}) >= 14 and len(found) >= 80
    for kind, name in found:
        fine = kind(**ARGUMENTS.get(kind.__name__, {}))
        with pytest.raises(ValueError, match=rf"{name} (is )?-1"):
            dataclasses.replace(fine, **{name: -1})


@dataclasses.dataclass(frozen=True)
class Numbers:
    share: Share | None = None
    several: tuple[PositiveInt, ...] = (0,)
    """Not held to it: a bound is of a number."""


def test_a_number_may_be_absent():
    check_numbers(Numbers())
    check_numbers(Numbers(share=1.0))
    with pytest.raises(ValueError, match=r"x\.share is 1\.5; it must be from 0 to 1"):
        check_numbers(Numbers(share=1.5), "x.")
