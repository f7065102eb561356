"""JSON from outside: text to values, and trees of frozen dataclasses as values and back, strictly.

`decode` is the exact inverse of `encode`. An unknown key, a missing one or a value of another type
is a ValueError that names the file, the dotted key and what was expected. A dataclass with a table
`kinds` stands for those in it, told apart by their field `kind`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import reprlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200


def shown(value: Any) -> str:
    """What an error repeats of a file, bounded in length and in depth."""
    return _repr.repr(value)


def parse(text: str | bytes, where: str) -> Any:
    """The values of a JSON text; ValueError naming the file `where`."""
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half of a pair is no character, and no file's text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); write it again") from error


def decode(kind: type[T], value: Any, where: str) -> T:
    """`value`, as the json module reads it, as an instance of the dataclass `kind`."""
    return _decode(kind, value, "", where)


def encode(value: Any) -> Any:
    """Dataclasses become objects, tuples become lists, leaves stay."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): encode(part) for key, part in value.items()}
    return value


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("optimizer.lr", 0.001), ...: a config's values by dotted key; lists stay whole, but those of
    objects, which are told apart by their names.
    """
    value = encode(config)
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        value = {part.get("name", index): part for index, part in enumerate(value)}
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for name, part in value.items():
        yield from leaves(part, f"{prefix}.{name}" if prefix else str(name))


def flatten(config: Any) -> dict[str, str]:
    """{"optimizer.lr": "0.001", ...}: a config's leaves as a tracker takes them."""
    return {key: str(value) for key, value in sorted(leaves(config))}


def defaults(config: Any, usual: Any = None, prefix: str = "") -> Iterator[str]:
    """The keys of `leaves` whose values are the defaults of their dataclasses; usual: the instance
    that is the default of this one as a whole.
    """
    for field in dataclasses.fields(config):
        key = f"{prefix}.{field.name}" if prefix else field.name
        value = getattr(config, field.name)
        default = _default(field) if usual is None else getattr(usual, field.name)
        if value == default and not (field.name == "kind" and usual is None):
            yield from (f"{key}{rest}" for rest, _ in _below(value))
        elif dataclasses.is_dataclass(value):
            same = default if type(default) is type(value) else None
            yield from defaults(value, same, key)
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for index, part in enumerate(value):
                yield from defaults(part, None, f"{key}.{getattr(part, 'name', index)}")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _below(value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a value by what their keys add to its own."""
    return ((f".{key}" if key else "", leaf) for key, leaf in leaves(value))


def _decode(kind: Any, value: Any, key: str, where: str) -> Any:
    """`value` as JSON gives it -> an instance of the annotation `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, key, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(key, value, f"one of {list(arguments)}", where)
        return value
    if hasattr(kind, "kinds") and not hasattr(kind, "kind"):
        return _decode(_of_kind(kind.kinds, value, key, where), value, key, where)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, key, where)
    if origin is tuple:
        expected = None if arguments[-1] is ... else len(arguments)
        if not isinstance(value, list) or expected not in (None, len(value)):
            many = "" if expected is None else f" of {expected}"
            raise _wrong(key, value, f"a list{many}", where)
        kinds = [arguments[0]] * len(value) if expected is None else arguments
        parts = zip(kinds, value, strict=True)
        return tuple(_decode(part, v, f"{key}.{i}", where) for i, (part, v) in enumerate(parts))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _wrong(key, value, "an object", where)
        prefix = f"{key}." if key else ""
        return {name: _decode(arguments[1], v, prefix + name, where) for name, v in value.items()}
    if kind is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not kind:
        raise _wrong(key, value, f"of type {kind.__name__}", where)
    return value


def _wrong(key: str, value: Any, wanted: str, where: str) -> ValueError:
    name = key or "the file"
    return ValueError(f"{where}: {name} is {shown(value)}; it must be {wanted}")


_type_hints = functools.cache(get_type_hints)


def _of_kind(kinds: Mapping[str, Any], value: Any, key: str, where: str) -> Any:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise _wrong(f"{key}.kind", kind, f"one of {sorted(kinds)}", where)
    return kinds[kind]


def _decode_union(members: tuple[Any, ...], value: Any, key: str, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    errors = []
    for member in (member for member in members if member is not type(None)):
        try:
            return _decode(member, value, key, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(" or ".join(errors))


def _decode_dataclass(kind: Any, value: Any, key: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object", where)
    known = [f.name for f in dataclasses.fields(kind)]
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
            dotted = f"{key}.{name}" if key else name
            raise ValueError(f"{where}: unknown key {dotted!r}; did you mean {', '.join(near)}?")
    hints = _type_hints(kind)
    prefix = f"{key}." if key else ""
    fields = {name: _decode(hints[name], v, prefix + name, where) for name, v in value.items()}
    for f in dataclasses.fields(kind):
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and f.name not in fields:
            raise ValueError(f"{where}: the key {prefix + f.name!r} is missing")
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
