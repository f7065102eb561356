"""Figures: means over slots, the same for any number of workers; the history file of a run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from train.tiny import micro_batches, tiny_batch

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.train.meters import History, Meter


def measure(num_steps: int) -> dict[str, float]:
    meter = Meter()
    for step in range(num_steps):
        for batch, clock in micro_batches(step, dist.rank(), dist.size()):
            loss = torch.tensor(float(10 * step + clock.slot) / 7)
            meter.add_slot(batch, clock, {"a": loss, "b": 2 * loss})
        meter.add_step(step, torch.tensor(step + 1.0), waited=0.0)
    return meter.read()


def test_means_are_over_slots_and_equal_at_any_number_of_workers(process_pool):
    alone = measure(3)
    slots = {"source0": (0, 1, 2), "source1": (3, 4)}
    for source, numbers in slots.items():
        values = [(10 * step + slot) / 7 for step in range(3) for slot in numbers]
        assert alone[f"loss/{source}/a"] == pytest.approx(sum(values) / len(values))
    assert alone["loss"] == pytest.approx(
        3 * sum(10 * t + s for t in range(3) for s in range(5)) / 105
    )
    assert alone["grad_norm"] == 2.0
    for size in (2, 3):
        for found in process_pool(size).run(measure, 3):
            same = [key for key in alone if key.startswith(("loss", "grad_norm"))]
            assert {key: found[key] for key in same} == {key: alone[key] for key in same}  # bitwise


def test_skipped_samples_are_counted_and_idle_slots_are_not():
    meter = Meter()
    batch = dataclasses.replace(tiny_batch(0, 0), skipped=1)
    meter.add_slot(batch, Clock(0, 0, 2), {"a": torch.tensor(1.0)})
    meter.add_slot(batch, Clock(0, 0, 2, idle=True), {"a": torch.tensor(5.0)})
    meter.add_step(0, torch.tensor(1.0), waited=0.0)
    figures = meter.read()
    assert figures["skipped_samples"] == 1 and figures["loss"] == 1.0
    assert "loss" not in meter.read()


def test_a_gradient_that_is_not_finite_names_the_step():
    meter = Meter()
    meter.add_step(4, torch.tensor(float("inf")), waited=0.0)
    with pytest.raises(ValueError, match=r"gradient's norm was inf at step 4.*clip_norm"):
        meter.read()


@pytest.mark.parametrize("root", ["{tmp}", "memory://history"])
def test_history_drops_what_is_done_again_and_lines_cut_short(tmp_path, root):
    path = root.format(tmp=tmp_path) + "/metrics.jsonl"
    history = History(path, 0)
    assert history.read() == []
    for step in (1, 2, 3):
        history.append(step, {"loss": 1 / step})
    if "://" not in path:
        with open(path, "a") as file:
            file.write('{"step": 4, "lo')
    resumed = History(path, 2)
    assert [line["step"] for line in resumed.read()] == [1, 2]
    resumed.append(3, {"loss": 9.0})
    again = History(path, 9).read()
    assert again == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0}]
    assert json.loads(json.dumps(again)) == again
    assert History(path, 0).read() == []


def test_a_line_that_cannot_be_written_comes_with_the_next(tmp_path, capsys):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    history = History(str(path), 0)
    history.read()
    path.unlink()
    path.mkdir()
    history.append(1, {"loss": 1.0})
    assert f"cannot write {path}" in capsys.readouterr().out
    path.rmdir()
    history.append(2, {"loss": 2.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
