"""Plain processes: one group, the real error, nothing left behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from multiprocessing import util
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as torch_dist

from memseg_dist import dist
from memseg_dist.platforms import local
from memseg_dist.platforms.process import Failure, RunFailed, summary_of

REPOSITORY = Path(__file__).resolve().parents[2]


def add_up(config_json, context):
    if context.size > 1:
        util.get_temp_dir()
        util.Finalize(None, time.sleep, (0.5,), exitpriority=0)  # its deletion comes after this
    total = dist.all_reduce_sum(torch.tensor(float(context.rank + 1)))
    names = ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "DS_ACCELERATOR")
    return {
        "config": config_json,
        "sum": total.item(),
        "size": dist.size(),
        "device": str(context.device),
        "environment": {name: os.environ.get(name) for name in names},
    }


def listening(config_json, context):
    """Addresses at which this process waits for connections, once the group has talked."""
    dist.all_reduce_sum(torch.zeros(1))
    sockets = psutil.Process().net_connections(kind="inet")
    own = sorted({s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN})
    return {"addresses": dist.all_gather_object(own)}


def break_on_rank_1(config_json, context, *, how):
    if context.rank == 1:
        util.get_temp_dir()
        if how == "raise":
            raise ValueError("shard-000003.tar is truncated: draw it again")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce_sum(torch.zeros(1))
    return {}


def run_until_asked(config_json, context, *, ready):
    step = 0
    util.get_temp_dir()  # as loader processes need one
    while not context.should_stop():
        step += 1
        if context.rank == 0 and step == 2:
            Path(ready).touch()
        time.sleep(0.02)
    return {"stopped": True}


def never_stop(config_json, context, *, ready):
    """In the middle of a step that takes for ever."""
    dist.all_reduce_sum(torch.zeros(1))
    Path(ready).touch()
    time.sleep(300)
    return {}


def never_come(config_json, context):
    """The last worker hangs before a collective."""
    impatient = torch_dist.new_group(timeout=timedelta(seconds=3))
    with dist.naming_absent_ranks():
        if context.rank == context.size - 1:
            time.sleep(300)
        torch_dist.all_reduce(torch.zeros(1), group=impatient)
    return {}


def start(folder: Path, worker, workers: int) -> subprocess.Popen[str]:
    """A driver, in a process group of its own, whose `worker` has begun. Prints the result."""
    ready, script = folder / "ready", folder / "script.py"
    (folder / "tmp").mkdir()
    script.write_text(
        textwrap.dedent(
            f"""
            import functools, sys
            sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(__file__).parent)!r}]
            from test_local import {worker.__name__}
            from memseg_dist.platforms import local
            if __name__ == "__main__":
                worker = functools.partial({worker.__name__}, ready={str(ready)!r})
                print(local.run(worker, "", {workers}, use_gpu=False))
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(folder / "tmp")},
    )
    wait_for(ready.exists)
    return process


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "multiprocessing.spawn" in " ".join(child.cmdline())
    ]


def test_a_group_listens_to_this_machine_alone():
    found = local.run(listening, "", 2, use_gpu=False)["addresses"]
    assert found and {address for own in found for address in own} <= {"127.0.0.1", "::1"}
    store = local._store_on_loopback()
    sockets = psutil.Process().net_connections(kind="inet")
    mine = [s.laddr for s in sockets if s.status == psutil.CONN_LISTEN]
    assert ("127.0.0.1", store.port) in mine and {ip for ip, _ in mine} == {"127.0.0.1"}


def test_as_many_workers_as_cores_within_the_bounds(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    bounds = {(1, 8): 3, (1, 2): 2, (4, 8): 4, (1, 1): 1, (5, 5): 5}
    assert {pair: local.fitting_workers(pair, use_gpu=False) for pair in bounds} == bounds


@pytest.mark.parametrize("workers", [1, 2])
def test_a_group_of_workers_shares_one_run(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = len(children())
    result = local.run(add_up, "the config", workers, use_gpu=False)
    assert result["config"] == "the config"
    assert (result["sum"], result["size"]) == ({1: 1.0, 2: 3.0}[workers], workers)
    assert result["device"] == "cpu"
    assert result["environment"] == {
        "RANK": "0",
        "WORLD_SIZE": str(workers),
        "LOCAL_SIZE": str(workers),
        "DS_ACCELERATOR": "cpu",
    }
    assert len(children()) == before
    assert not list(tmp_path.glob("pymp-*"))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("raise", "worker 1: shard-000003.tar is truncated: draw it again"),
        ("kill", "worker 1: killed by SIGKILL; was the machine out of memory?"),
    ],
)
def test_the_error_of_the_worker_that_failed_first_is_the_error(how, text, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ours = Path(util.get_temp_dir())  # whose name the workers inherit
    before = len(children())
    with pytest.raises(RunFailed) as caught:
        local.run(functools.partial(break_on_rank_1, how=how), "", 2, use_gpu=False)
    assert str(caught.value) == text
    assert how == "kill" or not set(tmp_path.glob("pymp-*")) - {ours}
    assert ours.is_dir()
    assert len(children()) == before


def test_a_worker_that_hangs_is_named():
    with pytest.raises(RunFailed, match="RuntimeError: worker 2 did not come to a collective"):
        local.run(never_come, "", 3, use_gpu=False)


def test_a_lone_worker_raises_its_own_error():
    def fail(config_json, context):
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        local.run(fail, "", 1, use_gpu=False)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_to_the_process_group_asks_every_worker_to_leave(
    tmp_path, workers, stop_signal
):
    driver = start(tmp_path, run_until_asked, workers)
    os.killpg(driver.pid, stop_signal)
    output, _ = driver.communicate(timeout=60)
    assert output.strip() == "{'stopped': True}"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_ctrl_c_ends_at_once(tmp_path, workers):
    driver = start(tmp_path, never_stop, workers)
    helpers = psutil.Process(driver.pid).children(recursive=True)
    assert driver.stderr
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.stderr.readline() == "\n"
    assert "a checkpoint is saved first" in driver.stderr.readline()
    os.killpg(driver.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in driver.communicate(timeout=30)[1]
    wait_for(lambda: not any(map(is_alive, helpers)), timeout_s=20)


def test_stop_signals_that_interrupt_each_other_are_heeded():
    """A worker hears SIGTERM from the process group and from its parent, one within the other."""
    script = """
        import signal, time
        from memseg_dist.platforms.local import LocalContext
        context = LocalContext(0, 1, "cpu")
        signal.signal(signal.SIGALRM, lambda number, frame: context.ask_to_stop())
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            context.ask_to_stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, timeout=20, check=True, cwd=REPOSITORY)


def test_workers_die_with_a_killed_parent(tmp_path):
    driver = start(tmp_path, run_until_asked, 2)
    workers = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    assert len(workers) >= 2
    wait_for(lambda: not any(map(is_alive, workers)), timeout_s=20)
    assert not list((tmp_path / "tmp").iterdir())


def is_alive(process: psutil.Process) -> bool:
    """An orphan that nobody has reaped yet is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, timeout_s=90.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_fallout_is_not_taken_for_the_cause():
    failures = {
        0: Failure("RuntimeError: Connection closed by peer [127.0.0.1]:4242", "trace"),
        1: Failure("KeyError: 'door'", "line 1\nKeyError: 'door'"),
    }
    assert summary_of(failures) == "worker 1: KeyError: 'door'\n\nline 1\nKeyError: 'door'"
    failures[1] = Failure("killed by SIGKILL", died=True)
    assert summary_of(failures) == "worker 1: killed by SIGKILL"


def test_a_gpu_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match="use_gpu is True, but torch finds no CUDA device"):
        local.run(add_up, "", 1, use_gpu=True)


def test_a_stop_signal_is_heeded_where_nobody_reads_the_output():
    """`job 2>&1 | tee log` and Ctrl-C: the pipe breaks first."""
    script = """
        import os, signal, sys
        from memseg_dist.platforms import process
        asked = []
        process.outlive_readers()
        with process.heeding_stop_signals(lambda: asked.append(1)):
            sys.stdin.readline()  # until the pipe is broken
            os.kill(os.getpid(), signal.SIGINT)
            print("a line of the run", flush=True)
        assert process.stop_was_asked()
        sys.exit(75 if asked == [1] else 1)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    reading, writing = os.pipe()
    driver = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=writing, stderr=writing, cwd=REPOSITORY
    )
    os.close(writing)
    os.close(reading)
    driver.communicate(b"\n", timeout=60)
    assert driver.returncode == 75
