"""One driver per run: the living are left alone, the dead make way."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from memseg_dist.train import lease
from memseg_dist.train.lease import FILE, Lease, holding

HOLDING = """
import sys, time
from memseg_dist.train.lease import holding
with holding(sys.argv[1]):
    print("held", flush=True)
    time.sleep(300)
"""


def held_elsewhere(directory: Path, beat: int = 0) -> None:
    entry = Lease("another", "far", "far away", 1, 0.0, beat)
    Path(directory, FILE).write_text(json.dumps(dataclasses.asdict(entry)))


def test_a_second_driver_is_refused_until_the_first_is_killed(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        wanted = rf"the run {tmp_path} is driven by process {first.pid} on .*; stop that one first"
        with pytest.raises(ValueError, match=wanted), holding(str(tmp_path)):
            pass
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # dead; a zombie until the end
        started = time.monotonic()
        with holding(str(tmp_path)):
            assert time.monotonic() - started < 5
            assert json.loads(Path(tmp_path, FILE).read_text())["pid"] != first.pid
        assert not Path(tmp_path, FILE).exists()
    finally:
        first.kill()
        first.wait()


def test_a_beat_from_another_machine_refuses_and_silence_makes_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "SILENCE_S", 0.5)
    held_elsewhere(tmp_path)
    threading.Timer(0.2, held_elsewhere, (tmp_path, 1)).start()
    with pytest.raises(ValueError, match="driven by process 1 on far"), holding(str(tmp_path)):
        pass
    with holding(str(tmp_path)):  # nothing beats now
        first = json.loads(Path(tmp_path, FILE).read_text())
        time.sleep(0.5)
        later = json.loads(Path(tmp_path, FILE).read_text())
        assert first["owner"] == later["owner"] and later["beat"] > first["beat"]
    assert "looking for its heartbeat" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_driver_that_lost_its_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    left = threading.Event()

    def leave(code):
        left.set()
        raise SystemExit

    monkeypatch.setattr(lease.os, "_exit", leave)
    with holding(str(tmp_path)):
        held_elsewhere(tmp_path)
        assert left.wait(10)
    assert json.loads(Path(tmp_path, FILE).read_text())["host"] == "far"  # not ours to delete


def test_a_url_will_do_and_a_damaged_lease_holds_nothing(tmp_path):
    with (
        holding("memory://leased"),
        pytest.raises(ValueError, match="is driven by"),
        holding("memory://leased"),
    ):
        pass
    Path(tmp_path, FILE).write_text('{"owner": ')
    with holding(str(tmp_path)):
        pass


def test_a_store_that_fails_at_the_end_does_not_hide_how_it_ended(tmp_path, monkeypatch):
    def fail(directory):
        raise ConnectionError("gone")

    with pytest.raises(KeyError, match="the cause"), holding(str(tmp_path)):
        monkeypatch.setattr(lease, "_read", fail)
        raise KeyError("the cause")
