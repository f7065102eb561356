"""The command for a GPU runs where there is none, at sizes that any machine takes."""

import importlib
from pathlib import Path


def test_every_part_is_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    gpu = importlib.import_module("gpu")
    gpu.main(["--device", "cpu", "--tiny"])
    lines = capsys.readouterr().out.splitlines()
    parts = [line.split("|")[1:4] for line in lines if line.startswith("| ")][2:]
    wanted = ["peak"] * 3 + ["step"] * 3 + ["weak", "bank", "contrast", "k-means", "prediction"]
    assert [name.split()[0].strip(":") for name, *_ in parts] == wanted
    assert all(float(took) >= 0 for _, took, _ in parts)
    assert parts[3][2].strip() == "100.0 %"
