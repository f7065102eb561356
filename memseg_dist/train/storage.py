"""Files of a run: local paths and URLs alike, hashed as they are written, errors shared by all.

Tensors are streamed in the safetensors format, so no second copy of them is held and nothing is
read back to be hashed. The `safetensors` package reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.data.files import is_url, join, read_bytes

T = TypeVar("T")

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 16 * 2**20


class HashingFile:
    """Passes bytes on to `file` and hashes them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_tensors(file: HashingFile, tensors: Mapping[str, Tensor]) -> None:
    """One tensor at a time goes through host memory, whatever device it is on."""
    header: dict[str, dict] = {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor '{name}' of {tensor.dtype} cannot be written to a checkpoint")
        end = offset + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        data = memoryview(flat.numpy())  # type: ignore[arg-type]
        for start in range(0, len(data), CHUNK):
            file.write(data[start : start + CHUNK])


def hash_file(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def write_tensor_file(directory: str, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns {"sha256", "bytes"} of what was written."""
    return write_file(directory, name, lambda file: write_tensors(file, tensors))


def write_json(directory: str, name: str, value: Any) -> dict[str, Any]:
    return write_file(directory, name, lambda file: file.write(json.dumps(value).encode()))


def write_file(directory: str, name: str, write: Callable[[HashingFile], None]) -> dict[str, Any]:
    with open_file(join(directory, name), "wb") as file:
        hashing = HashingFile(file)
        write(hashing)
        if not is_url(directory):
            file.flush()
            os.fsync(file.fileno())
    return {"sha256": hashing.hexdigest(), "bytes": hashing.num_bytes}


def read_json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


@contextlib.contextmanager
def open_file(path: str, mode: str) -> Iterator[BinaryIO]:
    if is_url(path):
        with fsspec.open(path, mode) as file:
            yield file
    else:
        with open(path, mode) as file:
            yield file  # type: ignore[misc]


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path of a file; one from a URL is gone afterwards. ValueError if it is missing."""
    if not is_url(path):
        if not Path(path).is_file():
            raise ValueError(f"{path} is missing")
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        filesystem, remote = fsspec.core.url_to_fs(path)
        filesystem.get_file(remote, f"{directory}/file")
        yield f"{directory}/file"


def make_empty(directory: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(directory)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)
    filesystem.makedirs(root, exist_ok=True)


def make_writable(directory: str) -> None:
    """Make the directory and try it, before hours are spent on what could not be kept."""
    filesystem, root = fsspec.core.url_to_fs(directory)
    try:
        filesystem.makedirs(root, exist_ok=True)
        write_json(directory, ".writable", {})
        filesystem.rm_file(join(root, ".writable"))
    except OSError as error:
        raise ValueError(
            f"cannot write to {directory}: {error}; set `storage` to a place that you may write to"
        ) from error


def rename(source: str, target: str) -> None:
    """Local directories only. On disk when this returns."""
    sync_directory(source)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(source, target)
    sync_directory(str(Path(target).parent))


def sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def on_rank_0(function: Callable[[], T]) -> T:
    """Rank 0's result, or its error, on every rank. Collective."""
    return together(lambda: function() if dist.rank() == 0 else None)[0]  # type: ignore[return-value]


def together(function: Callable[[], T]) -> list[T]:
    """function() on every rank: all results, or on all ranks the first's error. Collective."""
    result, message = None, None
    try:
        result = function()
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = f"cannot read or write: {error}"
    outcomes = dist.all_gather_object((message, result))
    for rank, (failed, _) in enumerate(outcomes):
        if failed is not None:
            raise ValueError(f"worker {rank}: {failed}" if dist.size() > 1 else failed)
    return [value for _, value in outcomes]  # type: ignore[misc]
