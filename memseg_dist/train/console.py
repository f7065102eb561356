"""What a person sees of a run on standard output: what it is, then a line per interval.

On a terminal a bar stands below the lines. It moves by the lines alone, so the driver of a Ray
cluster, which gets nothing but the workers' lines, draws the same one.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from memseg_dist.config import RunConfig
from memseg_dist.train.overview import Overview
from memseg_dist.train.platform import Tracker
from memseg_dist.train.validate import EVALUATION

WIDTH = 110
"""Columns of the overview where standard output is no terminal."""
WAIT_SHARE = 0.05
"""A line says how long the workers waited for data above this share of the time."""
_STEP = re.compile(r"step +(\d+)/(\d+)(?:.* (ETA \S+))?")


class StepBar:
    """A bar below the lines of a run, on a terminal, until its last step or `close`; nothing
    elsewhere.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._is_closed = False

    def see(self, line: str) -> None:
        """Moves to the step of a line that begins with `step 500/800`."""
        found = _STEP.match(line)
        if found is None:
            return
        step, total, eta = int(found[1]), int(found[2]), found[3] or ""
        if step == total:
            self.close()
            return
        if self._progress is None:
            if self._is_closed or not sys.stdout.isatty():
                return
            texts = map(TextColumn, ("{task.completed}/{task.total}", "{task.description}"))
            columns = SpinnerColumn(), next(texts), BarColumn(), TimeElapsedColumn(), next(texts)
            self._progress = Progress(*columns, transient=True)
            self._progress.add_task("", total=None)
            self._progress.start()
        task = self._progress.task_ids[0]
        self._progress.update(task, completed=step, total=total, description=eta)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._is_closed = None, True


class ConsoleTracker(Tracker):
    """The overview, one line per call of `log_metrics`, and how the run ended."""

    def __init__(self, config: RunConfig) -> None:
        self._steps = config.steps
        sources = config.active_sources
        self._shares = {source.name: source.slots / config.num_slots for source in sources}
        self._bar = StepBar()
        self._first: tuple[float, int] | None = None

    def begin(self, overview: Overview) -> None:
        width = None if sys.stdout.isatty() else WIDTH
        console = Console(width=width, markup=False, highlight=False)
        console.print(rendered(overview))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        if "loss" in metrics:
            parts += self._training(metrics, step)
        parts += [
            f"{name.removeprefix(EVALUATION).replace('miou', 'mIoU').replace('_', ' ')} {value:.2f}"
            for name, value in metrics.items()
            if name.startswith(EVALUATION)
        ]
        line = "  ".join(parts)
        print(line, flush=True)
        self._bar.see(line)

    def finish(self, status: str) -> None:
        self._bar.close()
        print(f"run {status}", flush=True)

    def _training(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Progress, and the loss as the sum of its parts, mean times share of the slots."""
        terms = []
        for name, value in metrics.items():
            group, _, rest = name.partition("/")
            source = next((s for s in self._shares if rest.startswith(f"{s}/")), None)
            if group == "loss" and source is not None:
                terms.append(f"{rest} {self._shares[source] * value:.3f}")
        parts = [
            f"{step / self._steps:4.0%}",
            f"ETA {self._remaining(step, metrics['step_seconds'])}",
            f"{metrics['images_per_second']:.3g} images/s",
            f"loss {metrics['loss']:.3f} = {' + '.join(terms)}",
            f"lr {metrics['lr']:.2e}",
        ]
        if metrics["data_wait_share"] > WAIT_SHARE:
            parts.append(f"waited for data {metrics['data_wait_share']:.0%}")
        if metrics["skipped_samples"]:
            parts.append(f"{metrics['skipped_samples']:.0f} unreadable samples skipped")
        return parts

    def _remaining(self, step: int, step_seconds: float) -> str:
        """By the time of all that happened since the first line, evaluations too."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, step
        elapsed, steps = now - self._first[0], step - self._first[1]
        seconds = (self._steps - step) * (elapsed / steps if steps else step_seconds)
        hours, minutes = divmod(round(seconds) // 60, 60)
        return f"{hours}:{minutes:02d}:{round(seconds) % 60:02d}"


def rendered(overview: Overview) -> Group:
    table = Table(box=SIMPLE, pad_edge=False)
    for heading, justify in (
        ("data", "left"), ("teaches by", "left"), ("images", "right"), ("classes", "right"),
        ("present", "right"), ("a step", "left"), ("crop", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in overview.data:
        table.add_row(
            row.name, row.teaches, f"{row.num_images:,}", f"{row.num_classes:,}",
            f"{row.num_present:,}", row.slots, row.crop,
        )  # fmt: skip
    facts = Table.grid(padding=(0, 2))
    for name, fact in overview.facts.items():
        facts.add_row(name, Text(fact, overflow="fold"))
    warnings = [Text(f"warning: {text}", style="yellow") for text in overview.warnings]
    return Group(Text(overview.title, style="bold"), table, facts, "", *warnings)
