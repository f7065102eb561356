"""The benchmark of loader processes that begin runs, and tells them apart."""

import re
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "loader_start.py"


def test_it_counts_what_a_script_costs_its_loader_processes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--processes", "1", "--repeats", "1"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    peer, ours, limit = map(int, re.findall(r"(\d+) MB", capsys.readouterr().out))
    assert peer > ours > limit == 0
