"""Local paths and fsspec URLs, one way to read and write them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec


def default_cache() -> Path:
    """Where indexes and remote shards are kept: $MEMSEG_CACHE, else ~/.cache/memseg-dist."""
    return Path(os.environ.get("MEMSEG_CACHE") or Path.home() / ".cache" / "memseg-dist")


def is_url(path: str | Path) -> bool:
    return "://" in str(path) or str(path).startswith("pipe:")


def check_path(path: str | Path) -> str:
    """The path as text; ValueError for `pipe:`, which would run a shell command."""
    text = str(path)
    if text.startswith("pipe:"):
        raise ValueError(
            f"refusing {text!r}: a pipe: URL runs a shell command; give a file path or an fsspec "
            "URL (s3://, gs://, https://)"
        )
    return text


def join(root: str | Path, name: str) -> str:
    """`root/name`, for a local folder or a URL; `name` itself if it is absolute or a URL."""
    if is_url(name) or name.startswith("/"):
        return check_path(name)
    return f"{check_path(root).rstrip('/')}/{name}"


def local_path(path: str | Path) -> Path | None:
    """The path on this machine, or None for a remote URL."""
    text = check_path(path)
    if text.startswith("file://"):
        return Path(urlsplit(text).path)
    return None if is_url(text) else Path(text)


def absolute(path: str | Path) -> str:
    """A local path as it is called from any working directory; a URL as it is."""
    local = local_path(path)
    return str(path) if local is None else str(local.expanduser().resolve())


def exists(path: str | Path) -> bool:
    filesystem, inside = fsspec.core.url_to_fs(check_path(path))
    return bool(filesystem.exists(inside))


def read_bytes(path: str | Path) -> bytes:
    """The whole file; ValueError naming the path if it cannot be read."""
    try:
        filesystem, inside = fsspec.core.url_to_fs(check_path(path))
        return bytes(filesystem.cat_file(inside))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}; check the path") from error


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; ValueError naming the path if it cannot be read."""
    try:
        return json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); write it again") from error


def make_folder(path: str | Path) -> Path:
    """A local folder that exists; ValueError naming it if it cannot be made or written to."""
    local = local_path(path)
    if local is None:
        raise ValueError(f"cannot write to the URL {path}: write to a local folder and upload it")
    try:
        local.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(local, error) from error
    if not os.access(local, os.W_OK):
        raise unwritable(local, PermissionError("no permission to write"))
    return local


def unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write to {path}: {error}; give a folder that you may write to")


def temporary_beside(path: Path) -> Path:
    """A name of its own in the same folder, so that a rename onto `path` is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` among all processes of this machine."""
    with open(path, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def write_atomically(path: str | Path, content: bytes) -> None:
    """All of `content` or nothing, under `path`."""
    target = make_folder(Path(check_path(path)).parent) / Path(path).name
    temporary = temporary_beside(target)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)
