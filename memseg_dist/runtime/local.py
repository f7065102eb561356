"""Workers as plain processes of this machine, joined in one group. No restarts, no other machines.

    result = run(worker, config_json, workers=2, use_gpu=None)

One worker runs in this process. The workers of a larger group die with the process that started
them, even if that is killed, and with each other.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

from memseg_dist import dist
from memseg_dist.runtime import process
from memseg_dist.runtime.api import Context
from memseg_dist.runtime.process import Failure, RunFailed

Worker = Callable[[str, Context], dict[str, Any]]

GRACE_S = 2.0
"""How long the other workers' errors are collected after the first."""


class LocalContext:
    """A worker's view of its group; SIGTERM asks it to leave."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._asked = threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda signum, frame: self._asked.set())

    def report(self, metrics: Mapping[str, float], checkpoint: str | None = None) -> None:
        pass

    def should_stop(self) -> bool:
        return bool(dist.all_reduce_sum(torch.tensor(int(self._asked.is_set()))) > 0)


def run(worker: Worker, config_json: str, workers: int, use_gpu: bool | None = None) -> dict:
    """worker(config_json, context) on `workers` processes; what rank 0 returned.

    RunFailed carries the text of the error that came first. One worker's own error passes through.
    """
    gpu = process.has_gpu(use_gpu)
    if gpu and workers > torch.cuda.device_count():
        raise ValueError(
            f"launch.workers {workers} is more than the {torch.cuda.device_count()} GPUs of this "
            "machine; use fewer workers, or a Ray cluster (--launch.launcher ray)"
        )
    if workers > 1:
        return _run_group(worker, config_json, workers, gpu)
    handler = signal.getsignal(signal.SIGTERM)
    process.set_environment(0, 1, 0, 1, gpu)
    process.join_group_of_one(gpu)
    try:
        return worker(config_json, LocalContext(0, 1, _device(0, gpu)))
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _run_group(worker: Worker, config_json: str, workers: int, gpu: bool) -> dict:
    context = mp.get_context("spawn")
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for rank in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (worker, config_json, rank, workers, store.port, gpu, theirs)
            child = context.Process(target=_serve, args=arguments, name=f"memseg-{rank}")
            child.start()
            theirs.close()
            processes.append(child)
            pipes.append(ours)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda signum, frame: _terminate(processes))
        return _first_result(processes, pipes)
    finally:
        for child in processes:
            child.kill()
            child.join()
            child.close()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _first_result(processes: list, pipes: list[Connection]) -> dict:
    """Rank 0's result once every worker has given one. RunFailed as soon as one does not."""
    results: dict[int, dict] = {}
    failures: dict[int, Failure] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = connection.wait(list(waiting.values()), timeout=GRACE_S if failures else None)
        if failures and not ready:
            break
        for rank, pipe in list(waiting.items()):
            if pipe not in ready:
                continue
            del waiting[rank]
            try:
                outcome = pipe.recv()
            except EOFError:
                processes[rank].join()
                outcome = _death(processes[rank].exitcode)
            if isinstance(outcome, Failure):
                failures[rank] = outcome
            else:
                results[rank] = outcome
    if failures:
        raise RunFailed(process.summary_of(failures))
    return results[0]


def _serve(
    worker: Worker, config_json: str, rank: int, size: int, port: int, gpu: bool, pipe: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    process.set_environment(rank, size, rank, size, gpu)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    context = LocalContext(rank, size, _device(rank, gpu))
    try:
        store = torch_dist.TCPStore("127.0.0.1", port, is_master=False)
        torch_dist.init_process_group(
            process.backend(gpu),
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(minutes=30),
        )
        outcome: dict | Failure = worker(config_json, context)
    except Exception as error:  # noqa: BLE001 - whatever it was, the parent is to tell the user
        outcome = Failure.of(error)
    pipe.send(outcome)
    if isinstance(outcome, Failure):
        os._exit(1)  # without waiting for peers that wait for us
    process.leave_group()


def _device(local_rank: int, gpu: bool) -> torch.device:
    if not gpu:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _terminate(processes: list) -> None:
    for child in processes:
        child.terminate()


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _death(exit_code: int | None) -> Failure:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; was the machine out of memory?" if -exit_code == signal.SIGKILL else ""
        return Failure(f"killed by {name}{hint}", died=True)
    return Failure(f"exited with code {exit_code} and no word", died=True)
