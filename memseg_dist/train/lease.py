"""One driver per run: a lease with a heartbeat in the run's storage.

    with holding(config.directory):     # ValueError while another driver is at work on the run
        ...

`lease.json` names the driver's process and counts its beats. On the driver's own machine the next
one looks whether that process lives: a killed driver makes way at once. From elsewhere it watches
the beat: one that goes on refuses it, one that stands still for SILENCE_S makes way. No clocks are
compared. Two drivers that start within the same second on a URL, which has no locks, are told apart
by the next beat: the one that lost the lease ends.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil

from memseg_dist.data.files import filesystem_of, is_url, join, locked
from memseg_dist.jsonable import decode
from memseg_dist.train.storage import replace_file

FILE = "lease.json"
BEAT_S = 5.0
SILENCE_S = 60.0
"""How long a heartbeat is watched before its driver is taken for dead: several beats."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """owner: drawn for this driver. place: within which process numbers are unique."""

    owner: str
    host: str
    place: str
    pid: int
    started: float
    beat: int = 0

    @property
    def is_alive_here(self) -> bool:
        """Whether the process lives; only for a lease of this very place."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < 10  # or its number was reused
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@contextmanager
def holding(directory: str) -> Iterator[None]:
    """Within, this process alone drives the run in `directory`, which exists.

    ValueError if another one does; finding that out can take SILENCE_S.
    """
    mine = _lease_of_this_process()
    with _one_at_a_time(directory):
        _await_turn(directory, mine)
        _write(directory, mine)
    is_over = threading.Event()
    heart = threading.Thread(target=_beat, args=(directory, mine, is_over), daemon=True)
    heart.start()
    try:
        yield
    finally:
        is_over.set()
        heart.join()
        try:
            if _is_of(mine, _read(directory)):
                filesystem, path = filesystem_of(join(directory, FILE))
                filesystem.rm_file(path)
        except Exception as error:  # noqa: BLE001 - how the run ended matters more
            log.warning("cannot give back %s: %s", join(directory, FILE), error)


def _lease_of_this_process() -> Lease:
    host, place = socket.gethostname(), [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():  # containers may share a host's name, but no numbering of processes
        place += [boot.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    started = psutil.Process().create_time()
    return Lease(uuid.uuid4().hex, host, " ".join(place), os.getpid(), started)


def _one_at_a_time(directory: str) -> AbstractContextManager[None]:
    return nullcontext() if is_url(directory) else locked(Path(directory, ".lease.lock"))


def _await_turn(directory: str, mine: Lease) -> None:
    held = _read(directory)
    if held is None:
        return
    in_use = ValueError(
        f"the run {directory} is driven by process {held.pid} on {held.host}; stop that one first "
        "(SIGTERM, it saves a checkpoint), or give this run another name"
    )
    if held.place == mine.place:
        if held.is_alive_here:
            raise in_use
        return
    print(
        f"the run {directory} was last driven by process {held.pid} on {held.host}: looking for "
        f"its heartbeat, for {SILENCE_S:.0f} s at most",
        flush=True,
    )
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT_S))
        now = _read(directory)
        if now is None:
            return
        if now != held:
            raise in_use


def _beat(directory: str, mine: Lease, is_over: threading.Event) -> None:
    while not is_over.wait(BEAT_S):
        try:
            found = _read(directory)
            if found is not None and not _is_of(mine, found):
                print(
                    f"process {found.pid} on {found.host} has taken over the run {directory}, "
                    "since this one was not heard of; it ends here",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            mine = dataclasses.replace(mine, beat=mine.beat + 1)
            _write(directory, mine)
        except Exception as error:  # noqa: BLE001 - a store that fails for a while ends no run
            log.warning("cannot renew %s: %s", join(directory, FILE), error)


def _is_of(mine: Lease, found: Lease | None) -> bool:
    return found is not None and found.owner == mine.owner


def _read(directory: str) -> Lease | None:
    """None also for a file that says nothing."""
    filesystem, path = filesystem_of(join(directory, FILE))
    try:
        return decode(Lease, json.loads(filesystem.cat_file(path)), path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("ignoring the damaged %s: %s", path, error)
        return None


def _write(directory: str, lease: Lease) -> None:
    replace_file(join(directory, FILE), json.dumps(dataclasses.asdict(lease)).encode())
