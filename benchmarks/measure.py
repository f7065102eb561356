"""Time and peak memory of one thing at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

MEBIBYTE = 1 << 20


def seconds(function: Callable[[], object], *, repeats: int = 5, warm_up: int = 1) -> float:
    """Median wall time of function() in seconds."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        function()
        _synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peak_mebibytes(function: Callable[[], object]) -> float:
    """Extra memory at the worst moment: the allocator's peak on CUDA, sampled RSS on CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    process = psutil.Process()
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    function()
    done.set()
    sampler.join()
    return max(peak - before, 0) / MEBIBYTE


def peak_rss_gibibytes() -> float:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def in_subprocess(script: str, *arguments: object, timeout: float = 900) -> dict:
    """Run `python script --worker arguments...`, which prints one JSON object on its last line."""
    environment = os.environ | {"PYTHONPATH": str(Path(script).resolve().parents[1])}
    command = [sys.executable, script, "--worker", *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment
    )
    if result.returncode == -9:
        return {"failed": "killed: out of memory"}
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.strip().splitlines()[-1])


def machine() -> dict:
    """What the figures were taken on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
