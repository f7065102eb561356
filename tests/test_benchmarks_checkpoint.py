"""The checkpoint's benchmark runs."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "checkpoint.py"


def test_it_times_a_checkpoint_waited_for_and_one_in_the_background(monkeypatch, capsys, tmp_path):
    arguments = ["--megabytes", "1", "--repeats", "1", "--directory", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "waited for" in printed and "until it was whole" in printed
    assert not list(tmp_path.iterdir())
