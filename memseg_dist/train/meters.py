"""Figures of a run: collected on the device, read once per log interval, kept as JSON lines."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Batch, Clock
from memseg_dist.config import RunConfig, to_json
from memseg_dist.data.files import exists, is_url, join, read_bytes
from memseg_dist.jsonable import defaults, flatten
from memseg_dist.train.platform import Context, Tracker
from memseg_dist.train.storage import on_rank_0, replace_file
from memseg_dist.train.validate import EVALUATION


class Meter:
    """What happened since the last `read`, on all ranks.

    Tensors are kept as they are until `read` fetches them in one transfer, so recording never waits
    for the device. Means are taken in (step, slot) order: the same for any number of workers.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._losses: list[tuple[int, int, str, str]] = []
        self._values: list[Tensor] = []
        self._norms: list[tuple[int, Tensor]] = []
        self._images = self._skipped = 0
        self._waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last read: it went into a checkpoint or an evaluation."""
        self._started = time.perf_counter()

    def add_slot(self, batch: Batch, clock: Clock, losses: Mapping[str, Tensor]) -> None:
        if clock.idle:
            return
        self._images += len(batch.keys)
        self._skipped += batch.skipped
        for name, loss in losses.items():
            self._losses.append((clock.step, clock.slot, batch.source, name))
            self._values.append(loss.detach())

    def add_step(self, step: int, grad_norm: Tensor, waited: float) -> None:
        """waited: seconds that this rank waited for data."""
        self._norms.append((step, grad_norm.detach()))
        self._waited += waited

    def read(self) -> dict[str, float]:
        """Means since the last read, once the device is done; starts afresh. Collective.

        ValueError naming step, source and loss if a loss or a gradient is not finite.
        """
        tensors = [*self._values, *(norm for _, norm in self._norms)]
        values = torch.stack([t.float().reshape(()) for t in tensors]).tolist() if tensors else []
        seconds = max(time.perf_counter() - self._started, 1e-9)
        mine = [(*entry, value) for entry, value in zip(self._losses, values)]
        norms = [
            (step, value) for (step, _), value in zip(self._norms, values[len(self._losses) :])
        ]
        gathered = dist.all_gather_object((mine, self._images, self._skipped, self._waited))
        self._forget()
        losses_of_ranks, images, skipped, waited = zip(*gathered)
        losses = sorted(entry for part in losses_of_ranks for entry in part)
        _check_finite(losses, norms)
        num_steps = max(len(norms), 1)
        return _means(losses) | {
            "grad_norm": sum(value for _, value in norms) / num_steps,
            "images_per_second": sum(images) / seconds,
            "step_seconds": seconds / num_steps,
            "data_wait_share": sum(waited) / seconds / len(waited),
            "skipped_samples": float(sum(skipped)),
        }


LossEntry = tuple[int, int, str, str, float]
"""step, slot, source, name of the loss, its value."""


def _means(losses: list[LossEntry]) -> dict[str, float]:
    """`loss/SOURCE/NAME` over the source's slots, and `loss` over all slots."""
    groups: dict[str, list[float]] = {}
    totals: dict[tuple[int, int], float] = {}
    for step, slot, source, name, value in losses:
        groups.setdefault(f"loss/{source}/{name}", []).append(value)
        totals[step, slot] = totals.get((step, slot), 0.0) + value
    figures = {key: sum(group) / len(group) for key, group in sorted(groups.items())}
    if totals:
        figures["loss"] = sum(totals.values()) / len(totals)
    return figures


def _check_finite(losses: list[LossEntry], norms: list[tuple[int, float]]) -> None:
    advice = "lower optimizer.lr, set optimizer.clip_norm, or use engine.precision fp32"
    for step, slot, source, name, value in losses:
        if not math.isfinite(value):
            raise ValueError(
                f"the loss '{name}' of source '{source}' was {value} at step {step} (slot {slot}); "
                f"the last checkpoint is from before it. To go on, {advice}"
            )
    for step, value in norms:
        if not math.isfinite(value):
            raise ValueError(
                f"the gradient's norm was {value} at step {step} with finite losses; to go on, "
                f"{advice}"
            )


class History:
    """`metrics.jsonl` of a run, for rank 0: one line per log, `step` first.

    Lines of steps that a resumed run will do again are dropped. A local file grows line by line; at
    a URL, where files cannot grow, it is written anew. A line that cannot be written ends no run:
    it is written with the next one.
    """

    def __init__(self, path: str, first_step: int) -> None:
        self._path, self._first_step = path, first_step
        self._lines: list[str] = []
        self._is_behind = False

    def read(self) -> list[dict[str, float]]:
        """Drop the lines after the first step; what is left. OSError if it cannot be written."""
        if self._first_step > 0 and exists(self._path):
            lines = read_bytes(self._path).decode().splitlines()
            self._lines = [line for line in lines if _step_of(line) <= self._first_step]
        self._rewrite()
        return [json.loads(line) for line in self._lines]

    def append(self, step: int, figures: Mapping[str, float]) -> None:
        self._lines.append(json.dumps({"step": step, **figures}))
        try:
            if is_url(self._path) or self._is_behind:
                self._rewrite()
            else:
                with open(self._path, "a") as file:
                    file.write(self._lines[-1] + "\n")
            self._is_behind = False
        except Exception as error:  # noqa: BLE001 - object stores have errors of their own
            self._is_behind = True
            print(f"cannot write {self._path}: {error}; training goes on", flush=True)

    def _rewrite(self) -> None:
        replace_file(self._path, "".join(f"{line}\n" for line in self._lines).encode())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut short by a kill


_NO_PARAMETER = re.compile(r"name|storage|loader.cache_dir|(sources.+|validation)[.](name|path)")
"""Settings that say where things lie and what data sets are called, which is told otherwise."""


def log_config(config: RunConfig, tracker: Tracker) -> None:
    """On rank 0, before anything that can fail."""
    params = flatten(config)
    untold = {name for name in params if _NO_PARAMETER.fullmatch(name)}
    tracker.log_params(params, untold.union(defaults(config)))
    tracker.log_text("config.json", to_json(config))


class Recorder:
    """Figures on their way out: history file and tracker (rank 0), launcher (all ranks).

    last: the newest figure of each name. evaluated: the steps with figures of an evaluation.
    """

    def __init__(
        self, config: RunConfig, context: Context, tracker: Tracker, first_step: int
    ) -> None:
        self._context, self._tracker = context, tracker
        self._history = History(join(config.directory, "metrics.jsonl"), first_step)
        self.last: dict[str, float] = {}
        self.evaluated: set[int] = set()
        for line in on_rank_0(self._history.read):
            self._keep(int(line.pop("step")), line)

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Collective."""
        self._keep(step, figures)
        if dist.rank() == 0:
            self._history.append(step, figures)
            self._tracker.log_metrics(figures, step)
        self._context.report(figures)

    def _keep(self, step: int, figures: dict[str, float]) -> None:
        self.last |= figures
        if any(name.startswith(EVALUATION) for name in figures):
            self.evaluated.add(step)
