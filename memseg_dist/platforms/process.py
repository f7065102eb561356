"""What a worker process needs, whoever starts it: its environment, its group, a readable death."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as torch_dist

_FALLOUT = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "gloo",
    "nccl",
    "socket",
    "barrier",
)
"""Words in the errors of workers that only lost their peer."""


class RunFailed(RuntimeError):
    """Training failed. The text is the first worker's own error, short enough to read."""


class WorkerError(RuntimeError):
    """An error on its way from a worker to the driver: (text, details) of a `Failure`."""


@dataclass(frozen=True)
class Failure:
    """How one worker ended. text: its error in a line or a few; details: a traceback, or ""."""

    text: str
    details: str = ""
    died: bool = False

    @staticmethod
    def of(error: BaseException) -> Failure:
        if isinstance(error, WorkerError):
            return Failure(*error.args)
        if isinstance(error, (ValueError, KeyboardInterrupt)):  # the user's: the text says it all
            return Failure(str(error) or type(error).__name__)
        details = "".join(traceback.format_exception(error)).strip()
        return Failure(f"{type(error).__name__}: {error}", details)

    @property
    def is_fallout(self) -> bool:
        """Whether this is what a worker says when another one is gone."""
        return not self.died and any(word in self.text.lower() for word in _FALLOUT)


def summary_of(failures: Mapping[int, Failure]) -> str:
    """One text for the failures of some ranks: the cause first, its traceback cut to the end."""
    ranked = sorted(failures.items(), key=lambda item: (item[1].is_fallout, item[1].died, item[0]))
    rank, cause = ranked[0]
    ranks = [other for other, failure in ranked if failure.text == cause.text]
    who = f"worker {rank}" if len(ranks) == 1 else f"workers {', '.join(map(str, sorted(ranks)))}"
    lines = [f"{who}: {cause.text}"]
    if cause.details:
        lines += ["", *cause.details.splitlines()[-12:]]
    return "\n".join(lines)


class _Stop:
    was_asked = False


_stop = _Stop()


def stop_was_asked() -> bool:
    """Whether a signal has asked to stop since `heeding_stop_signals` began the last time: it may
    have come too late for the run that heard it.
    """
    return _stop.was_asked


class _Outlet:
    """A stream whose text goes nowhere once it cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._until_it_breaks():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._until_it_breaks():
            self._stream.flush()

    @contextmanager
    def _until_it_breaks(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def outlive_readers() -> None:
    """Lets this process go on when nobody reads its output any more: Ctrl-C ends the `tee` of
    `job | tee log` first, and a closed terminal must not cost a checkpoint.
    """
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), _Outlet):
            setattr(sys, name, _Outlet(stream))


@contextmanager
def heeding_stop_signals(ask_to_stop: Callable[[], object]) -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C call `ask_to_stop`; a second Ctrl-C is a KeyboardInterrupt.

    A thread other than the main one cannot set that, and does without.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _stop.was_asked = True
        ask_to_stop()
        text = b"\nstopping: a checkpoint is saved first (Ctrl-C again: it is not)\n"
        with suppress(OSError):  # nobody may be reading any more
            os.write(2, text)  # `print` may be what was interrupted

    _stop.was_asked = False
    before = [signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def set_environment(rank: int, size: int, local_rank: int, local_size: int, use_gpu: bool) -> None:
    """What DeepSpeed and its just-in-time builds read from the environment. Before they load.

    use_gpu: False keeps DeepSpeed off a GPU that the run was not given.
    """
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"] = str(local_size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    scripts = str(Path(sys.executable).parent)  # where pip puts ninja
    path = os.environ.get("PATH", "")
    if scripts not in path.split(os.pathsep):
        os.environ["PATH"] = f"{scripts}{os.pathsep}{path}"


def backend(use_gpu: bool) -> str:
    """CPU tensors always travel on gloo, so host-side sizes cost no GPU synchronisation."""
    return "cpu:gloo,cuda:nccl" if use_gpu else "gloo"


def has_gpu(use_gpu: bool | None) -> bool:
    """`launch.use_gpu` on this machine. ValueError if a GPU is demanded and there is none."""
    available = torch.cuda.is_available()
    if use_gpu and not available:
        raise ValueError(
            "launch.use_gpu is True, but torch finds no CUDA device here; "
            "leave it out (--launch.use-gpu None) or set it to False"
        )
    return available if use_gpu is None else use_gpu


def join_group_of_one(use_gpu: bool) -> None:
    """A process group of this process alone, kept until it exits: DeepSpeed caches its group."""
    if torch_dist.is_initialized():
        return
    torch_dist.init_process_group(
        backend(use_gpu), store=torch_dist.HashStore(), rank=0, world_size=1
    )
    atexit.register(leave_group)


def leave_group() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
