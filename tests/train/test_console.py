"""The lines of a run: progress, losses that add up, scores; and the bar of a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest
import rich
from train.shards import larvseg_config

from memseg_dist.train.console import ConsoleTracker, StepBar

FIGURES = {
    "lr": 1e-3,
    "loss/masks/seg": 2.0,
    "loss/weak/aux": 0.5,
    "loss/weak/cls": 1.0,
    "loss": 1.8,  # 3 slots of masks and 2 of labels
    "grad_norm": 1.0,
    "images_per_second": 20.0,
    "step_seconds": 2.0,
    "data_wait_share": 0.01,
    "skipped_samples": 0.0,
}


@pytest.fixture
def tracker(tmp_path):
    return ConsoleTracker(larvseg_config(tmp_path, tmp_path, steps=100))


def test_a_line_says_how_far_and_its_losses_add_up(tracker, capsys):
    tracker.log_metrics(FIGURES, 10)
    line = capsys.readouterr().out
    assert line.startswith("step  10/100   10%  ETA 0:03:00  20 images/s  loss 1.800 = ")
    total, terms = re.search(r"loss (\S+) = (.*?)  lr", line).groups()
    parts = dict(term.split(" ") for term in terms.split(" + "))
    assert parts == {"masks/seg": "1.200", "weak/aux": "0.200", "weak/cls": "0.400"}
    assert sum(map(float, parts.values())) == pytest.approx(float(total))
    assert "waited" not in line and "skipped" not in line


def test_a_line_says_what_is_wrong(tracker, capsys):
    tracker.log_metrics(FIGURES | {"data_wait_share": 0.4, "skipped_samples": 3.0}, 10)
    line = capsys.readouterr().out
    assert "waited for data 40%" in line and "3 unreadable samples skipped" in line


def test_scores_have_a_line_of_their_own(tracker, capsys):
    tracker.log_metrics({"val/miou_all": 12.345, "val/pixel_accuracy": 50.0}, 100)
    assert capsys.readouterr().out == "step 100/100  mIoU all 12.35  pixel accuracy 50.00\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_terminal_has_a_bar(kind, monkeypatch):
    screen = kind()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(rich, "_console", None)  # not below a bar that another test left
    bar = StepBar()
    bar.see("anything else")
    assert screen.getvalue() == ""
    bar.see("step  40/100   40%  ETA 0:03:00  20 images/s")
    bar.close()
    assert ("40/100" in screen.getvalue() and "0:03:00" in screen.getvalue()) == (kind is Terminal)
