"""Files of a run: local paths and URLs alike, hashed as they are written, errors shared by all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from memseg_dist import dist
from memseg_dist.data import files
from memseg_dist.data.files import filesystem_of, is_url, join, reading

T = TypeVar("T")


def write_tensors(directory: str, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A safetensors file. Returns {"sha256", "bytes"} of what was written."""
    on_host = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return _write(directory, name, lambda path: save_file(on_host, path))


def write_json(directory: str, name: str, value: Any) -> dict[str, Any]:
    """Returns {"sha256", "bytes"} of what was written."""
    return _write(directory, name, lambda path: Path(path).write_text(json.dumps(value)))


def _write(directory: str, name: str, write: Callable[[str], Any]) -> dict[str, Any]:
    """write(path) makes a local file, which goes on to `directory` if that is a URL."""
    target = join(directory, name)
    with tempfile.TemporaryDirectory() if is_url(target) else contextlib.nullcontext("") as scratch:
        path = f"{scratch}/file" if scratch else target
        write(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = file.tell()
        if scratch:
            filesystem, remote = filesystem_of(target)
            filesystem.put_file(path, remote)
    return {"sha256": digest, "bytes": num_bytes}


def replace_file(path: str, content: bytes) -> None:
    """All of `content` or what was there before, at a path or URL."""
    if is_url(path):
        filesystem, remote = filesystem_of(path)
        filesystem.pipe_file(remote, content)
    else:
        files.write_atomically(path, content)


def read_json(path: str) -> dict[str, Any]:
    """ValueError naming a file that cannot be read or holds no JSON object."""
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path of a file; one from a URL is gone afterwards. ValueError if it is missing."""
    if not is_url(path):
        if not Path(path).is_file():
            raise ValueError(f"{path} is missing")
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        filesystem, remote = filesystem_of(path)
        with reading(path):
            filesystem.get_file(remote, f"{directory}/file")
        yield f"{directory}/file"


@contextlib.contextmanager
def reading_tensors(path: str) -> Iterator[None]:
    """ValueError naming a safetensors file that is damaged, or lacks what is read of it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; take another checkpoint") from error


def make_empty(directory: str) -> None:
    filesystem, root = filesystem_of(directory)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)
    filesystem.makedirs(root, exist_ok=True)


def make_writable(directory: str) -> None:
    """Make the directory and try it, before hours are spent on what could not be kept."""
    try:
        filesystem, root = filesystem_of(directory)
        filesystem.makedirs(root, exist_ok=True)
        write_json(directory, ".writable", {})
        filesystem.rm_file(join(root, ".writable"))
    except Exception as error:  # object stores have errors of their own
        raise ValueError(
            f"cannot write to {directory}: {error}; set `storage` (--storage) to a place that you "
            "may write to"
        ) from error


def rename(source: str, target: str) -> None:
    """Local directories only. On disk when this returns."""
    _sync_directory(source)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(source, target)
    _sync_directory(str(Path(target).parent))


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def on_rank_0(function: Callable[[], T]) -> T:
    """Rank 0's result, or its error, on every rank. Collective."""
    return together(lambda: function() if dist.rank() == 0 else None)[0]  # type: ignore[return-value]


def together(function: Callable[[], T]) -> list[T]:
    """function() on every rank: all results, or on all ranks the first's error. Collective.

    ValueError, or RuntimeError for what is neither the user's nor a file's.
    """
    result, message, cause = None, None, None
    kind: type[Exception] = ValueError
    try:
        result = function()
    except Exception as error:  # noqa: BLE001 - the other ranks must not wait for this one
        message, cause = str(error), error
        if isinstance(error, (OSError, SafetensorError)):
            message = f"cannot read or write: {error}"
        elif not isinstance(error, ValueError):  # object stores have errors of their own
            message, kind = f"{type(error).__name__}: {error}", RuntimeError
    outcomes = dist.all_gather_object((message, kind, result))
    for rank, (failed, raised, _) in enumerate(outcomes):
        if failed is not None:
            text = f"worker {rank}: {failed}" if dist.size() > 1 else failed
            raise raised(text) from (cause if rank == dist.rank() else None)
    return [value for *_, value in outcomes]  # type: ignore[misc]
