"""Workers as plain processes of this machine, joined in one group. No restarts, no other machines.

    result = run(worker, config_json, workers=2, use_gpu=None)

One worker runs in this process. The workers of a larger group die with the process that started
them, even if that is killed, and with each other.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

from memseg_dist import dist
from memseg_dist.data.loader_process import (
    delete_temporary_folder,
    have_own_temporary_folder,
    starting_processes,
)
from memseg_dist.platforms import process
from memseg_dist.platforms.process import Failure, RunFailed
from memseg_dist.train.platform import Context

Worker = Callable[[str, Context], dict[str, Any]]

GRACE_S = 2.0
"""How long the other workers' errors are collected after the first."""
LEAVE_S = 20.0
"""How long a worker that is done may take to clean up behind itself."""


class LocalContext:
    """A worker's view of its group; SIGTERM asks it to leave."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._asked = False

    def ask_to_stop(self) -> None:
        self._asked = True  # no Event: signal handlers interrupt each other, and one holds its lock

    def report(self, metrics: Mapping[str, float], checkpoint: str | None = None) -> None:
        pass

    def should_stop(self) -> bool:
        return bool(dist.all_reduce_sum(torch.tensor(int(self._asked))) > 0)


def run(
    worker: Worker,
    config_json: str,
    workers: int,
    use_gpu: bool | None = None,
    timeout_s: float = 900.0,
) -> dict:
    """worker(config_json, context) on `workers` processes; what rank 0 returned.

    timeout_s: how long a collective waits for a worker. RunFailed carries the text of the error
    that came first. One worker's own error passes through.
    """
    gpu = process.has_gpu(use_gpu)
    if gpu and workers > torch.cuda.device_count():
        raise ValueError(
            f"launch.workers {workers} is more than the {torch.cuda.device_count()} GPUs of this "
            "machine; use fewer workers, or a Ray cluster (--launch.launcher ray)"
        )
    if workers > 1:
        return _run_group(worker, config_json, workers, gpu, timeout_s)
    process.set_environment(0, 1, 0, 1, gpu)
    process.join_group_of_one(gpu)
    context = LocalContext(0, 1, _device(0, gpu))
    with process.heeding_stop_signals(context.ask_to_stop):
        return worker(config_json, context)


def fitting_workers(bounds: tuple[int, int], use_gpu: bool | None) -> int:
    """As many workers as this machine has GPUs, or else cores for, within (min, max)."""
    least, most = bounds
    devices = torch.cuda.device_count() if process.has_gpu(use_gpu) else os.cpu_count() or 1
    return min(most, max(least, devices))


def _run_group(worker: Worker, config_json: str, workers: int, gpu: bool, timeout_s: float) -> dict:
    context = mp.get_context("spawn")
    store = _store_on_loopback()
    processes: list[Any] = []
    pipes: list[Connection] = []

    def ask_to_stop() -> None:
        for child in processes:
            with suppress(ValueError):  # it is closed, the run is over
                child.terminate()

    with process.heeding_stop_signals(ask_to_stop):
        try:
            for rank in range(workers):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (theirs, worker, config_json, rank, workers, store.port, gpu, timeout_s)
                child = context.Process(target=_serve, args=arguments, name=f"memseg-{rank}")
                with starting_processes():  # it hears of signals once it can heed them
                    child.start()
                    processes.append(child)
                theirs.close()
                pipes.append(ours)
            if process.stop_was_asked():  # when some of them were not there yet
                ask_to_stop()
            result = _first_result(processes, pipes)
            for child in processes:
                child.join(LEAVE_S)
            return result
        finally:
            for child in processes:
                child.kill()
                child.join()
                child.close()


def _store_on_loopback() -> Any:
    """A TCPStore that no other machine reaches: by itself it would listen on every interface."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        return torch_dist.TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=server.detach(),
        )


def _loopback() -> str:
    """Name of this machine's loopback interface: lo, or lo0."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _first_result(processes: list, pipes: list[Connection]) -> dict:
    """Rank 0's result once every worker has given one. RunFailed as soon as one does not."""
    outcomes: dict[int, dict | Failure] = {}
    failures: dict[int, Failure] = {}
    waiting = list(pipes)
    while waiting:
        ready: list[Any] = connection.wait(waiting, timeout=GRACE_S if failures else None)
        if failures and not ready:
            break
        for pipe in ready:
            waiting.remove(pipe)
            rank = pipes.index(pipe)
            try:
                outcomes[rank] = pipe.recv()
            except EOFError:
                processes[rank].join()
                outcomes[rank] = _death(processes[rank].exitcode)
        failures = {rank: end for rank, end in outcomes.items() if isinstance(end, Failure)}
    if failures:
        raise RunFailed(process.summary_of(failures))
    return outcomes[0]  # type: ignore[return-value]


def _serve(pipe: Connection, *arguments: Any) -> None:
    """`_work(*arguments)`, whose outcome goes to the parent."""
    try:
        outcome: dict | Failure = _work(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it was, the parent is to tell the user
        outcome = Failure.of(error)
    if isinstance(outcome, Failure):
        delete_temporary_folder()  # the parent kills whoever is left once it knows
    pipe.send(outcome)
    if isinstance(outcome, Failure):
        os._exit(1)  # without waiting for peers that wait for us
    process.leave_group()


def _work(
    worker: Worker,
    config_json: str,
    rank: int,
    size: int,
    port: int,
    gpu: bool,
    timeout_s: float,
) -> dict:
    have_own_temporary_folder()
    process.outlive_readers()
    context = LocalContext(rank, size, _device(rank, gpu))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which asks us
    signal.signal(signal.SIGTERM, lambda number, frame: context.ask_to_stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    process.set_environment(rank, size, rank, size, gpu)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _loopback()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    store = torch_dist.TCPStore("127.0.0.1", port, is_master=False)
    torch_dist.init_process_group(
        process.backend(gpu),
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    return worker(config_json, context)


def _device(local_rank: int, gpu: bool) -> torch.device:
    if not gpu:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    delete_temporary_folder()
    os._exit(1)


def _death(exit_code: int | None) -> Failure:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; was the machine out of memory?" if -exit_code == signal.SIGKILL else ""
        return Failure(f"killed by {name}{hint}", died=True)
    return Failure(f"exited with code {exit_code} and no message", died=True)
