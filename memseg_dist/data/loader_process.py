"""Loader processes that live exactly as long as the training worker that they read for.

torch's own watchdog looks at a loader process's parent, which is the fork server and survives a
killed worker. And a stop signal to the whole process group (Ctrl-C, a batch system's SIGTERM) must
not take the data away from a worker that is about to save a checkpoint. Linux.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, util
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

TIMEOUT_S = 300.0
"""How long an item is waited for by default."""
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_LOOK_S = 1.0
"""How often a loader process looks whether its worker is alive."""


def process_options(num_processes: int, timeout_s: float) -> dict[str, Any]:
    """Arguments of a torch DataLoader with so many loader processes; 0 reads in the worker itself.

    timeout_s: how long the worker waits for an item before it raises RuntimeError.
    """
    if num_processes == 0:
        return {"num_workers": 0}
    # Forking a process that runs gloo, NCCL or Ray threads can deadlock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memseg_dist.data.loader"])
    return {
        "num_workers": num_processes,
        "multiprocessing_context": context,
        "worker_init_fn": _live_with_the_worker,
        "timeout": timeout_s,
    }


@contextmanager
def starting_processes() -> Iterator[None]:
    """Around the start of processes: Ctrl-C and SIGTERM wait, and do so in them as long as they
    like. (A fork server's children inherit that.)"""
    resource_tracker.ensure_running()  # it would unblock the signals, which children inherit
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def starting_loader_processes(num_processes: int) -> Iterator[None]:
    """`starting_processes()` that do not run the script of this process: a job imports all of the
    framework, which takes each of them 2 s and 215 MB. In one thread at a time.

    ValueError if they are given what only the script knows.
    """
    if num_processes == 0:
        yield
        return
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")  # whose file they would run
    try:
        util.get_temp_dir()  # made before them: they share it then, and delete it
        with starting_processes():
            yield
    except pickle.PicklingError as error:
        raise ValueError(
            f"loader processes do not run the script that starts them ({error}); put what they "
            "read with into a module, or use no loader processes"
        ) from error
    finally:
        sys.modules["__main__"] = script


def have_own_temporary_folder() -> None:
    """Of a process that has just begun: it inherits the name of its parent's, which must not be
    deleted with it.
    """
    multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]


def delete_temporary_folder() -> None:
    """That of the sockets of this process and its loader processes, before an exit at once."""
    shutil.rmtree(util.get_temp_dir(), ignore_errors=True)


def next_item(items: Iterator[T], name: Callable[[], str]) -> T:
    """The next item of a DataLoader; ValueError with its name() if it does not come in time."""
    try:
        return next(items)
    except RuntimeError as error:
        if "timed out" not in str(error):  # which is all that torch says
            raise
    raise ValueError(
        f"a loader process hangs: it has not read {name()} within loader.timeout_s; see whether "
        "the storage answers, or raise --loader.timeout-s"
    )


def _live_with_the_worker(number: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    threading.Thread(target=_end_with_the_worker, daemon=True).start()


def _end_with_the_worker() -> None:
    """Ends this process, even one that hangs in a read, when its worker dies or terminates it."""
    worker = multiprocessing.parent_process()
    assert worker is not None
    while worker.is_alive():
        received = signal.sigtimedwait(_STOP_SIGNALS, _LOOK_S)
        if received and (received.si_signo, received.si_pid) == (signal.SIGTERM, worker.pid):
            os._exit(0)
    delete_temporary_folder()  # the dead worker's
    os._exit(0)
