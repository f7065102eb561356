"""Remote shards on the local disk, bounded in bytes, shared by all processes of a machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from memseg_dist.batch import derive_seed
from memseg_dist.data import files

DEFAULT_CACHE_BYTES = 32 << 30

_CHUNK = 1 << 20
_WAIT_SECONDS = 0.05


class ShardCache:
    """`open(url)` gives a local file. Local paths pass through; the rest is downloaded once, and
    again when its store says that it has changed.

    The least recently opened files make room for new ones, so that the folder never holds more
    than `max_bytes`, downloads in progress included. A file that is evicted while a process has it
    open stays readable there.
    """

    def __init__(self, dir: str | Path, max_bytes: int) -> None:
        self.dir = Path(dir)
        self.max_bytes = max_bytes

    def open(self, url: str) -> IO[bytes]:
        """The file, open for reading; ValueError naming it if it is missing or cannot be held."""
        local = files.local_path(url)
        if local is not None:
            try:
                return open(local, "rb")
            except OSError as error:
                raise ValueError(
                    f"cannot open shard {local}: {error}; restore it or write the data set again"
                ) from error
        folder = files.make_folder(self.dir)
        known = files.info(url)
        name = f"{derive_seed(url, *files.fingerprint(url, known)):016x}"
        with files.locked(folder / f"{name}.lock"):  # one download of a file at a time
            target = folder / f"{name}.data"
            with files.locked(folder / "cache.lock"):
                if target.exists():
                    os.utime(target)
                    return open(target, "rb")
            return self._download(url, target, known)

    def _download(self, url: str, target: Path, known: Mapping[str, Any]) -> IO[bytes]:
        size = int(known["size"] or 0)
        if size > self.max_bytes:
            raise ValueError(
                f"shard {url} has {size} bytes but the cache may hold {self.max_bytes}; raise "
                "cache_bytes above the shards that one worker reads together"
            )
        with self._reserved(target, size) as (stream, temporary):
            with files.open_binary(url) as source:
                while chunk := source.read(_CHUNK):
                    stream.write(chunk)
            stream.flush()
            if size and stream.tell() != size:
                raise ValueError(f"shard {url}: got {stream.tell()} of {size} bytes; try again")
            with files.locked(self.dir / "cache.lock"):
                os.replace(temporary, target)
                return open(target, "rb")

    @contextlib.contextmanager
    def _reserved(self, target: Path, size: int) -> Iterator[tuple[IO[bytes], Path]]:
        """A temporary file of `size` bytes, made when there is room for it."""
        temporary = files.temporary_beside(target)
        while True:
            with files.locked(self.dir / "cache.lock"):
                if self._make_room(size):
                    stream = open(temporary, "xb")  # noqa: SIM115
                    fcntl.flock(stream, fcntl.LOCK_EX)  # held while its writer lives
                    stream.truncate(size)
                    break
            time.sleep(_WAIT_SECONDS)  # others are downloading; what they finish can be evicted
        try:
            with stream:
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        for leftover in self.dir.glob(".*.tmp"):
            if not _is_locked(leftover):
                leftover.unlink(missing_ok=True)  # of a process that was killed
        used = 0
        for unfinished in self.dir.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # its download has failed just now
                used += unfinished.stat().st_size
        held = [(path.stat(), path) for path in self.dir.glob("*.data")]
        used += sum(status.st_size for status, _ in held)
        for status, path in sorted(held, key=lambda item: item[0].st_mtime_ns):
            if used + size <= self.max_bytes:
                break
            path.unlink()
            used -= status.st_size
        return used + size <= self.max_bytes


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "r+b") as stream:  # NFS locks only what can be written
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
