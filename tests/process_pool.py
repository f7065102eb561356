"""A pool of processes joined in one gloo group, so that distributed tests cost no start-up each."""

from __future__ import annotations

import importlib.util
import inspect
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 300
PRELOADED = ["torch", "timm", "pyarrow.parquet", "memseg_dist.train.loop"]
"""Imported once; the ranks are forked from there and share their memory."""


class ProcessPool:
    def __init__(self, world_size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = _free_port()
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, theirs), daemon=False
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) on every rank; results in rank order. Raises with every rank's
        traceback.
        """
        source = inspect.getsourcefile(function)
        for pipe in self._pipes:
            pipe.send((source, function.__qualname__, args))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT_S} s")
            ok, value = pipe.recv()
            (results if ok else errors).append(value)
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, world_size: int, port: int, pipe) -> None:
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
    }
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        try:
            source, name, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, getattr(_load(source), name)(*args)))
        except BaseException:  # whatever a rank died of must reach the test
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    os._exit(0)  # nothing to save: skip the interpreter's slow teardown


def _load(source: str):
    """The test file as a module under the name pytest gives it, imported once per process."""
    name = Path(source).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
