"""Local paths and fsspec URLs, one way to read and write them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec import AbstractFileSystem

from memseg_dist.checks import check_without_secret, require
from memseg_dist.jsonable import parse

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Which optional dependencies of this package read URLs of a protocol."""
_VERSIONS = (
    "ETag", "etag", "generation", "Content-MD5", "Digest", "mtime", "LastModified",
    "Last-Modified", "last_modified", "updated", "created",
)  # fmt: skip
"""What stores call the marks of a file's content or age."""
_LOST_SLASH = re.compile(r"[\w+.-]+:/(?!/)")
"""What pathlib makes of a URL."""


def default_cache() -> Path:
    """Where indexes and remote shards are kept: $MEMSEG_CACHE, else ~/.cache/memseg-dist."""
    return Path(os.environ.get("MEMSEG_CACHE") or Path.home() / ".cache" / "memseg-dist")


def is_url(path: str | Path) -> bool:
    return "://" in str(path) or str(path).startswith("pipe:")


def check_path(path: str | Path) -> str:
    """The path as text; ValueError for `pipe:`, which would run a shell command, for a URL that was
    made a Path, which would be a local folder named "s3:", and for what no file system takes.
    """
    text = str(path)
    require("\0" not in text, "path", text, "without a zero byte")
    if text.startswith("pipe:"):
        raise ValueError(
            f"refusing {text!r}: a pipe: URL runs a shell command; give a file path or an fsspec "
            "URL (s3://, gs://, https://)"
        )
    if _LOST_SLASH.match(text):
        raise ValueError(
            f"{text!r} is a URL that has lost a slash, as in a Path; give a local path, or, where "
            "URLs are taken, the URL as text"
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
        return Path(text.removeprefix("file://"))  # as fsspec: '#', '?' and '%' are letters
    return None if is_url(text) else Path(text)


def absolute(path: str | Path) -> str:
    """A local path as it is called from any working directory; a URL as it is."""
    local = local_path(path)
    return str(path) if local is None else str(local.expanduser().resolve())


def data_root(path: str | Path) -> str:
    """Folder or URL of a data set, as `absolute`; ValueError for a URL with a secret."""
    root = absolute(path)
    if is_url(root):
        check_without_secret(root, "the data set")
    return root


def public(path: str | Path) -> str:
    """A URL without user, password and query, to be kept; a local path as it is."""
    if not is_url(path):
        return str(path)
    parts = urlsplit(str(path))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def filesystem_of(path: str | Path) -> tuple[AbstractFileSystem, str]:
    """The file system that holds a path or URL, and the path as it is called there.

    ValueError for a kind of URL that is not known, or whose package is not installed.
    """
    text = check_path(path)
    try:
        with reading(path):
            return fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(text.partition("://")[0])
        fix = f"pip install 'memseg-dist[{extra}]'" if extra else "check the URL"
        raise ValueError(f"cannot open {path}: {error}; {fix}") from error


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What the store of `path` raises becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:  # behind a URL each store has errors of its own
        is_ours = isinstance(error, (ValueError, ImportError))
        if is_ours or not (is_url(path) or isinstance(error, OSError)):
            raise
        reason = str(error.__cause__ or error) or repr(error)
        raise ValueError(f"cannot read {path}: {reason}; check the path") from error


@contextlib.contextmanager
def open_binary(path: str | Path) -> Iterator[IO[bytes]]:
    """The file, open for reading and seeking; ValueError naming it if it cannot be read."""
    filesystem, inside = filesystem_of(path)
    with reading(path), filesystem.open(inside, "rb") as stream:
        yield stream


def exists(path: str | Path) -> bool:
    filesystem, inside = filesystem_of(path)
    with reading(path):
        return bool(filesystem.exists(inside))


def info(path: str | Path) -> dict[str, Any]:
    """What the file's store knows of it, under the store's own names but for "size"."""
    filesystem, inside = filesystem_of(path)
    with reading(path):
        return filesystem.info(inside)


def fingerprint(path: str | Path, known: Mapping[str, Any] | None = None) -> list[str]:
    """What changes when the file changes, as far as its store tells; known: its `info`.

    Warns where that is its size at most, as of many web servers.
    """
    known = info(path) if known is None else known
    parts = [f"{name}={known[name]}" for name in ("size", *_VERSIONS) if known.get(name)]
    if not any(known.get(name) for name in _VERSIONS):
        store = str(path).partition("://")[0]
        warnings.warn(
            f"the store of {store}:// files tells neither a tag nor a time of them: one that is "
            "rewritten at the same size is not read anew; give changed data another URL",
            stacklevel=2,
        )
    return parts


def glob(path: str | Path, pattern: str) -> list[str]:
    """The names in a folder that fit, sorted."""
    filesystem, inside = filesystem_of(path)
    with reading(path):
        found = filesystem.glob(f"{inside.rstrip('/')}/{pattern}")
    return sorted(str(name).rpartition("/")[2] for name in found)


def read_bytes(path: str | Path) -> bytes:
    """The whole file; ValueError naming the path if it cannot be read."""
    filesystem, inside = filesystem_of(path)
    with reading(path):
        return bytes(filesystem.cat_file(inside))


def read_text(path: str | Path) -> str:
    """A UTF-8 file, without the mark that some editors put first; ValueError naming another."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from error


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; ValueError naming the path if it cannot be read."""
    return parse(read_bytes(path), str(path))


def make_folder(path: str | Path) -> Path:
    """A local folder that exists; ValueError naming it if it cannot be made or written to."""
    local = _not_a_url(path)
    try:
        local.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(local, error) from error
    if not os.access(local, os.W_OK):
        raise unwritable(local, PermissionError("no permission to write"))
    return local


def make_parent(path: str | Path) -> Path:
    """The local path of a file to write, in a folder that exists; ValueError as `make_folder`."""
    local = _not_a_url(path)
    return make_folder(local.parent) / local.name


def _not_a_url(path: str | Path) -> Path:
    local = local_path(path)
    if local is None:
        raise ValueError(f"cannot write to the URL {path}: write to a local folder and upload it")
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
    target = make_parent(path)
    temporary = temporary_beside(target)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # it was moved, or could not be made
            temporary.unlink()
