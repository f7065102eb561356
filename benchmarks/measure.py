"""Time and peak memory of one thing at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

MEBIBYTE = 1 << 20


def seconds(
    function: Callable[[], object],
    *,
    repeats: int = 5,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median time of function() in seconds: wall time, or what another clock says."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats):
        _synchronize()
        start = clock()
        function()
        _synchronize()
        times.append(clock() - start)
    return sorted(times)[len(times) // 2]


def clock_of(device: str) -> Callable[[], float]:
    """Wall time on a GPU; on a CPU the time of this process, which other work does not lengthen."""
    return time.perf_counter if _is_cuda(device) else time.process_time


def peak_mebibytes(function: Callable[[], object], device: str | None = None) -> float:
    """Extra memory at the worst moment: the allocator's peak on CUDA, sampled RSS on CPU.

    device: where the function works; CUDA by default if there is one.
    """
    if _is_cuda(device):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    import psutil  # which a machine with nothing but torch may lack

    process = psutil.Process()
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        function()
    finally:
        done.set()
        sampler.join()
    return max(peak - before, 0) / MEBIBYTE


def peak_rss_gibibytes() -> float:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def in_subprocess(
    script: str,
    *arguments: object,
    timeout: float = 900,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict:
    """Run `python script --worker arguments...`, which prints one JSON object on its last line."""
    env = os.environ | {"PYTHONPATH": str(Path(script).resolve().parents[1])} | environment
    command = [sys.executable, script, "--worker", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    if result.returncode == -9:
        return {"failed": "killed: out of memory"}
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.strip().splitlines()[-1])


def machine(device: str | None = None) -> dict:
    """What the figures were taken on. device: where the work was, as in `peak_mebibytes`."""
    return {
        "device": torch.cuda.get_device_name() if _is_cuda(device) else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def _is_cuda(device: str | None) -> bool:
    return torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
