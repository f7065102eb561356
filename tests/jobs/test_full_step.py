"""The paper's full size on a CPU: 21,841 synsets, ViT-B/16, D = 768, the bank on."""

import importlib
import math
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_full_size_step_fits_in_12_gibibytes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    figures = importlib.import_module("full_step").run(tmp_path)
    assert figures["peak_GiB"] < 12
    losses = {key: value for key, value in figures.items() if key.startswith("loss")}
    assert {name.split("/")[-1] for name in losses} >= {"seg", "cls", "aux"}
    assert all(math.isfinite(value) for value in losses.values())
