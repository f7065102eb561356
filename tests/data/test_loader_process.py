"""Loader processes: no stop signal reaches them, and they end with the worker they read for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import util
from pathlib import Path

import psutil
import pytest
from data.made import SPACE

from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source, TrainLoader
from memseg_dist.data.reader import Reader

TESTS = Path(__file__).resolve().parents[1]

READING = """# loader processes do not run this: it has no `if __name__ == "__main__"`
import signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
from data.test_loader_process import loader_of

heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("TERM"))
signal.signal(signal.SIGINT, lambda *_: heard.append("INT"))
loader = loader_of(sys.argv[2], num_processes=int(sys.argv[3]))
for step, _ in enumerate(loader.steps(0, 10**6)):
    if step == 0 or len(heard) == 2:  # from then on, a step a line
        print(step, flush=True)
        sys.stdin.readline()
"""


def loader_of(root: str | Path, **changes) -> TrainLoader:
    augment = AugmentConfig(resize=(64, 48), crop=32)
    source = Source("masks", str(root), "masks", 1, 2, augment)
    return TrainLoader((source,), SPACE, seed=5, **{"num_processes": 2, **changes})


@pytest.mark.parametrize("num_processes", [1, 2])
def test_they_outlive_a_stop_signal_and_end_with_a_killed_worker(
    masks_root, tmp_path, num_processes
):
    temporary = tmp_path / "t"
    temporary.mkdir()
    script = tmp_path / "script.py"
    script.write_text(READING)
    command = [sys.executable, str(script), str(TESTS), str(masks_root), str(num_processes)]
    worker = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert worker.stdin and worker.stdout and worker.stderr
    assert worker.stdout.readline() == "0\n"
    helpers = psutil.Process(worker.pid).children(recursive=True)
    assert len(helpers) >= 2 + num_processes  # resource tracker and fork server beside the loaders
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        os.killpg(worker.pid, stop_signal)  # everyone, as Ctrl-C and batch systems do
    for _ in range(20):  # more than was read ahead
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline()
    assert all(map(is_alive, helpers))
    worker.kill()
    wait_until(lambda: not any(map(is_alive, helpers)))
    assert "Traceback" not in worker.stderr.read()
    worker.wait()
    assert not list(temporary.iterdir())


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_what_only_the_script_knows_is_refused(masks_root, monkeypatch):
    class Own(Reader):
        pass

    monkeypatch.setattr(sys.modules["__main__"], "Own", Own, raising=False)
    Own.__module__, Own.__qualname__ = "__main__", "Own"
    loader = loader_of(masks_root)
    monkeypatch.setattr(loader._loader.dataset, "_readers", [Own.__new__(Own)])
    with pytest.raises(ValueError, match=r"do not run the script that starts them .*Own"):
        next(loader.steps(0, 1))


def test_without_loader_processes_there_are_no_sockets(masks_root, monkeypatch):
    made = []
    monkeypatch.setattr(util, "get_temp_dir", lambda: made.append(1))
    next(loader_of(masks_root, num_processes=0).steps(0, 1))
    assert not made


def test_a_read_that_hangs_is_named_and_ended(masks_root, tmp_path):
    root = tmp_path / "masks"
    root.mkdir()
    for file in Path(masks_root).iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    loader = loader_of(root, timeout_s=2.0)
    for shard in root.glob("*.tar"):
        shard.unlink()
        os.mkfifo(shard)  # as a file system that does not answer: `open` never returns
    before = {each.pid for each in loaders_here()}
    wanted = rf"has not read the samples \[.*\] of {root}/.*\.tar.* \(step 0, slot 0\) within"
    with pytest.raises(ValueError, match=wanted):
        next(loader.steps(0, 1))
    del loader
    wait_until(lambda: not [each for each in loaders_here() if each.pid not in before])


def loaders_here() -> list[psutil.Process]:
    everyone = psutil.Process().children(recursive=True)
    return [each for each in everyone if is_alive(each) and each.name() == "pt_data_worker"]


def is_alive(process: psutil.Process) -> bool:
    """An orphan that nobody has reaped yet is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
