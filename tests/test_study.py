"""Studies: what is done is kept, and what is no number is not averaged."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path

import pytest


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("study")


def train(study, variant, seed):
    if variant == "broken":
        raise ValueError(f"{variant} fails")
    return {"variant": variant, "seed": seed, "score": float(os.getpid() > 0)}


def test_one_run_that_fails_costs_no_other_and_a_cut_line_is_made_again(study, tmp_path):
    file = tmp_path / "results.jsonl"
    rows = [{"variant": "good", "seed": seed, "score": 7.0} for seed in (0, 1)]
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:-4])
    todo = [(None, "broken", 0), *((None, "good", seed) for seed in (0, 1, 2))]
    with pytest.raises(ValueError, match="broken fails"):
        study.run_all(train, todo, file, 1)
    kept = {row["seed"]: row["score"] for row in map(json.loads, file.read_text().splitlines())}
    assert kept == {0: 7.0, 1: 1.0, 2: 1.0}


def test_a_run_without_a_score_is_counted_and_left_out(study):
    assert study.mean_and_spread([1.0, math.nan, 3.0]) == "2.00 ± 1.41 (2 of 3)"
    assert study.mean_and_spread([math.nan]) == study.mean_and_spread([]) == "-"
    scores = {("a", 0): 3.0, ("b", 0): 1.0, ("a", 1): math.nan, ("b", 1): 1.0, ("a", 2): 1.0}
    rows = [{"variant": v, "seed": s, "score": x} for (v, s), x in scores.items()]
    assert study.paired(rows, "a", "b", "score") == [2.0]
    assert study.interval([2.0]) == "+2.00"
