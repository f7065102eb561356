"""Two optimizer steps of jobs/larvseg_21k.py at full size: peak memory, seconds, losses.

    python benchmarks/full_step.py [--json FILE]

ViT-B/16, crops of 512 and 320 pixels, two to a slot, all eight slots, 21,841 synsets and COCO-Stuff
in one label space, D = 768, the bank on; one worker, DeepSpeed, on drawn miniature pictures. The
process tree's resident memory is sampled; the evaluation is cut to the least. Two steps, because
no class of the memory is warm in the first; the figures are the second's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import psutil

ROOT = Path(__file__).resolve().parents[1]
FLAGS = """--smoke --steps 2 --every.log 1 --launch.launcher local --launch.workers 1
    --backbone.name vit_base_patch16_384 --backbone.image-size 512
    --sources.0.augment.crop 512 --sources.0.augment.resize 2048 512
    --sources.1.augment.crop 320 --sources.1.augment.resize 320 320
    --validation.max-images 1 --validation.num-panels 0 --tracking.kind none"""


def run(storage: Path) -> dict:
    """Figures of the step, and the most memory that the processes held together."""
    name = "full_step"
    command = [
        sys.executable, str(ROOT / "jobs" / "larvseg_21k.py"), *shlex.split(FLAGS),
        "--storage", str(storage), "--name", name,
    ]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=storage)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    lines = map(json.loads, (storage / name / "metrics.jsonl").read_text().splitlines())
    step = [line for line in lines if "loss" in line][-1]
    losses = {key: value for key, value in step.items() if key.startswith("loss")}
    return {
        "peak_GiB": peak / 2**30,
        "step_seconds": step["step_seconds"],
        "total_seconds": time.perf_counter() - started,
        **losses,
    }


def resident(pid: int) -> int:
    """Resident bytes of a process and its children; 0 once they are gone."""
    try:
        parent = psutil.Process(pid)
        return sum(item.memory_info().rss for item in [parent, *parent.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        figures = run(Path(storage))
    for key, value in figures.items():
        print(f"{key:40} {value:.4g}")
    if arguments.json:
        measure.write_json(arguments.json, [figures])


if __name__ == "__main__":
    main()
