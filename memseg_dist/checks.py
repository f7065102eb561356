"""Checks of a settings class when it is built: ValueErrors with key, value and what it must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import UnionType
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from urllib.parse import urlsplit

from memseg_dist import jsonable


def require(is_fine: object, key: str, value: Any, wanted: str) -> None:
    if not is_fine:
        raise ValueError(f"{key} is {value!r}; it must be {wanted}")


class Bound(NamedTuple):
    """What a number in a settings class must be; it stands in the field's annotation."""

    fits: Callable[[float], bool]
    wanted: str


_POSITIVE = Bound(lambda value: value > 0, "above 0")
_NOT_NEGATIVE = Bound(lambda value: value >= 0, "0 or more")
Positive: TypeAlias = Annotated[float, _POSITIVE]
PositiveInt: TypeAlias = Annotated[int, _POSITIVE]
NotNegative: TypeAlias = Annotated[float, _NOT_NEGATIVE]
NotNegativeInt: TypeAlias = Annotated[int, _NOT_NEGATIVE]
Share: TypeAlias = Annotated[float, Bound(lambda value: 0 <= value <= 1, "from 0 to 1")]


def check_numbers(settings: Any, section: str = "") -> None:
    """Fields whose annotation has a `Bound`; a field that is None is fine.

    section: the dotted key of `settings`, with its last dot ("optimizer.").
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
            for bound in getattr(part, "__metadata__", ()):
                value = getattr(settings, name)
                if isinstance(bound, Bound) and value is not None:
                    require(bound.fits(value), section + name, value, bound.wanted)


def check_leaves(settings: Any) -> None:
    """Finite numbers, and no URL that carries a secret, anywhere in a tree of settings."""
    for key, leaf in jsonable.leaves(settings):
        for value in leaf if isinstance(leaf, list) else [leaf]:
            if isinstance(value, float):
                require(math.isfinite(value), key, value, "a finite number")
            elif isinstance(value, str) and "://" in value:
                check_without_secret(value, key)


def check_without_secret(url: str, key: str) -> None:
    """ValueError, without the secret, for a URL with a password, an access key or a query."""
    parts = urlsplit(url)
    address = parts.netloc.rpartition("@")[2]
    has_user = address != parts.netloc and parts.scheme not in ("sftp", "ssh")
    if has_user or parts.password or parts.query:
        raise ValueError(
            f"{key} {parts.scheme}://{address}{parts.path} comes with a user, a password or a "
            "query ('?...'), which the cache, checkpoints and the tracking server would keep; "
            "leave them out and give secrets in the environment: MLFLOW_TRACKING_USERNAME and "
            "_PASSWORD or MLFLOW_TRACKING_TOKEN, PGPASSWORD, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, ..."
        )


def check_view(
    mode: str,
    resize: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int],
    section: str,
) -> None:
    """How a picture is fitted to a size and cut into windows. section: in front of the names."""
    height, width = (window, window) if isinstance(window, int) else window
    down, across = (stride, stride) if isinstance(stride, int) else stride
    require(min(resize) > 0, f"{section}resize", resize, "two positive sides")
    wanted = "one side or (height, width), above 0"
    require(min(height, width) > 0, f"{section}window", window, wanted)
    require(min(down, across) > 0, f"{section}stride", stride, wanted)
    if mode == "slide" and (down > height or across > width):
        raise ValueError(
            f"{section}stride {stride} is larger than {section}window {window}: pixels between the "
            f"windows would have no prediction; use {section}stride <= {section}window"
        )


def check_scales(scales: Sequence[float], key: str) -> None:
    """Sizes of a picture to look at, relative to its own."""
    is_fine = len(scales) > 0 and all(0 < scale < math.inf for scale in scales)
    require(is_fine, key, scales, "one or more finite numbers above 0")


def check_pairs(pairs: Sequence[Sequence[object]], key: str) -> None:
    """Pairs of classes that a mirror turns into each other."""
    classes = [item for pair in pairs for item in pair]
    is_fine = all(len(pair) == 2 for pair in pairs) and len(set(classes)) == len(classes)
    require(is_fine, key, pairs, "pairs of two different classes, each class in one pair at most")
