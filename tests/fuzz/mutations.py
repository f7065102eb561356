"""What befalls files: seeded accidents to bytes, to what a checksum covers, to trees of JSON.

Each takes what is whole and gives what is damaged, and says in words what it did.
"""

from __future__ import annotations

import copy
import json
import re
import struct
import zlib
from collections.abc import Iterator
from random import Random
from typing import Any

_BLOCKS = (1, 16, 512)


def damage(content: bytes, random: Random) -> tuple[bytes, str]:
    """One accident or a few, one after another."""
    told = []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        accident = random.choice(_ACCIDENTS)
        content, where = accident(content, random)
        told.append(f"{accident.__name__} {where}")
    return content, ", ".join(told)


def flip_bit(content: bytes, random: Random) -> tuple[bytes, str]:
    at, bit = random.randrange(len(content) or 1), random.randrange(8)
    flipped = bytes(byte ^ 1 << bit for byte in content[at : at + 1])
    return content[:at] + flipped + content[at + 1 :], f"{bit} at {at}"


def overwrite(content: bytes, random: Random) -> tuple[bytes, str]:
    at, size = random.randrange(len(content) or 1), random.choice((1, 4, 16))
    new = random.choice((random.randbytes(size), bytes(size), b"\xff" * size))
    return content[:at] + new + content[at + size :], f"{new!r} at {at}"


def cut(content: bytes, random: Random) -> tuple[bytes, str]:
    at = random.randrange(len(content) + 1)
    return content[:at], f"at {at}"


def insert_zeros(content: bytes, random: Random) -> tuple[bytes, str]:
    at, size = random.randrange(len(content) + 1), random.choice(_BLOCKS)
    return content[:at] + bytes(size) + content[at:], f"{size} at {at}"


def remove_block(content: bytes, random: Random) -> tuple[bytes, str]:
    start, stop = _block(content, random)
    return content[:start] + content[stop:], f"{start}:{stop}"


def repeat_block(content: bytes, random: Random) -> tuple[bytes, str]:
    start, stop = _block(content, random)
    return content[:stop] + content[start:stop] + content[stop:], f"{start}:{stop}"


def splice(content: bytes, random: Random) -> tuple[bytes, str]:
    """A piece of the file comes to lie over another."""
    (start, stop), (at, _) = _block(content, random), _block(content, random)
    piece = content[start:stop]
    return content[:at] + piece + content[at + len(piece) :], f"{start}:{stop} at {at}"


def change_number(content: bytes, random: Random) -> tuple[bytes, str]:
    found = [*re.finditer(rb"\d+", content)]
    if not found:
        return content, "that is not there"
    number = random.choice(found)
    new = random.choice((b"-1", b"0", b"1e400", b"nan", b"9" * 30, b"", b"0.5", b"65536"))
    return content[: number.start()] + new + content[number.end() :], f"{number[0]!r} to {new!r}"


_ACCIDENTS = (
    flip_bit, overwrite, cut, insert_zeros, remove_block, repeat_block, splice, change_number,
)  # fmt: skip


def _block(content: bytes, random: Random) -> tuple[int, int]:
    size = random.choice(_BLOCKS)
    start = random.randrange(0, len(content) or 1, size)
    return start, min(start + size * random.randint(1, 4), len(content))


# --------------------------------------------------------------------- below a checksum that fits


def damage_tar_header(content: bytes, at: int, random: Random) -> tuple[bytes, str]:
    """Another value of a field of the header at byte `at`, under the right checksum."""
    start, size = random.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100),
                                 (257, 8), (345, 155)))  # fmt: skip
    value = random.choice((
        random.randbytes(size), bytes(size), b"%0*o" % (size - 1, random.choice((1, 2**40))),
        b"\xff" * size, b"\x80" + random.randbytes(size - 1), b"../" * size,
        random.choice(b"0123456LKxgSVM7").to_bytes(1, "big"),
    ))[:size].ljust(size, b"\0")  # fmt: skip
    header = bytearray(content[at : at + 512])
    header[start : start + size] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :], f"field {start} {value!r} at {at}"


def damage_png(content: bytes, random: Random) -> tuple[bytes, str]:
    """Another content of a chunk, or a chunk more, under the right checksum."""
    chunks = [*_chunks(content)]
    number = random.randrange(len(chunks))
    name, data = chunks[number]
    if random.random() < 0.5:
        data, what = damage(data, random)
        chunks[number] = (name, data)
        what = f"in {name!r}: {what}"
    else:
        name = random.choice((
            b"gAMA", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"PLTE", b"acTL", b"fcTL",
            b"fdAT", b"eXIf", b"pHYs", b"cHRM", b"sRGB", b"IHDR", b"IDAT", b"IEND", b"abCd",
        ))  # fmt: skip
        text = b"key\0\0" + zlib.compress(bytes(1 << 22))
        data = random.choice((b"", random.randbytes(8), text, text[:-9], data))
        chunks.insert(max(number, 1), (name, data))
        what = f"{name!r} of {len(data)} bytes as chunk {max(number, 1)}"
    return content[:8] + b"".join(_sealed(*chunk) for chunk in chunks), what


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        yield content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        at += 12 + size


def _sealed(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# -------------------------------------------------------------------------------------- JSON trees

_STRANGE: tuple[Any, ...] = (
    None, True, "", "x", "..", "a\0b", "\ud800", -1, 0, 1, 2.5, 65535, 2**31, 2**63, 10**40,
    1e308, float("nan"), float("inf"), [], {}, [[]], {"kind": "x"}, "DEEP", "DEEPER", "LONG",
)  # fmt: skip
_TEXTS = {"DEEP": "[" * 400 + "]" * 400, "DEEPER": '{"a":' * 50_000, "LONG": "1" * 5000}


def damage_tree(tree: Any, random: Random) -> tuple[bytes, str]:
    """The tree's JSON text after one change or a few: another value or type, a key more or less."""
    holder, told = [copy.deepcopy(tree)], []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        parent, key, path = random.choice([*_places(holder, "")])
        told.append(_change(parent, key, random) + f" at {path}")
        if not holder:
            break
    text = json.dumps(holder[0] if holder else None)
    for name, long in _TEXTS.items():
        text = text.replace(f'"{name}"', long)
    return text.encode(), ", ".join(told)


def _places(parent: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """(container, key, path) of every value below `parent`."""
    for key, value in parent.items() if isinstance(parent, dict) else enumerate(parent):
        yield parent, key, f"{path}.{key}"
        if isinstance(value, (dict, list)):
            yield from _places(value, f"{path}.{key}")


def _change(parent: Any, key: Any, random: Random) -> str:
    value, strange = parent[key], copy.deepcopy(random.choice(_STRANGE))
    kind = random.choice(("replace", "replace", "remove", "add", "wrap", "as text", "swap"))
    if kind == "replace":
        parent[key] = strange
    elif kind == "remove":
        del parent[key]
    elif kind == "add" and isinstance(parent, dict):
        parent[random.choice(("x", "", f"{key}s", "kind"))] = strange
    elif kind == "add":
        parent.insert(key, copy.deepcopy(random.choice((value, strange))))
    elif kind == "wrap":
        parent[key] = random.choice(([value], {"x": value}, [value, copy.deepcopy(value)]))
    elif kind == "as text":
        parent[key] = str(value)
    else:
        other = random.choice([*parent] if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
        return f"swap with {other!r}"
    return f"{kind} {strange!r}" if kind in ("replace", "add") else kind
