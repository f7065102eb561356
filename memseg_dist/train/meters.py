"""Figures of a run: collected on the device, read once per log interval, kept as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Batch, Clock
from memseg_dist.data.files import exists, is_url, read_bytes, write_atomically
from memseg_dist.train.storage import open_file


class Meter:
    """What happened since the last `read`, on all ranks.

    Tensors are kept as they are until `read` fetches them in one transfer, so recording never waits
    for the device. Means are taken in (step, slot) order: the same for any number of workers.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._losses: list[tuple[int, int, str, str, Tensor]] = []
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
            entry = (clock.step, clock.slot, batch.source, name, loss.detach())
            self._losses.append(entry)

    def add_step(self, step: int, grad_norm: Tensor, waited: float) -> None:
        """waited: seconds that this rank waited for data."""
        self._norms.append((step, grad_norm.detach()))
        self._waited += waited

    def read(self) -> dict[str, float]:
        """Means since the last read, once the device is done; starts afresh. Collective.

        ValueError naming step, source and loss if a loss or a gradient is not finite.
        """
        scalars = [entry[-1].float().reshape(()) for entry in self._losses]
        scalars += [norm.float().reshape(()) for _, norm in self._norms]
        values = torch.stack(scalars).tolist() if scalars else []
        seconds = time.perf_counter() - self._started
        num_losses = len(self._losses)
        losses = [
            (*entry[:4], value)
            for entry, value in zip(self._losses, values[:num_losses], strict=True)
        ]
        norms = [
            (step, value) for (step, _), value in zip(self._norms, values[num_losses:], strict=True)
        ]
        mine = (losses, self._images, self._skipped, self._waited / max(seconds, 1e-9))
        gathered = dist.all_gather_object(mine)
        num_steps = len(norms)
        self._forget()
        every_loss = sorted(entry for part in gathered for entry in part[0])
        _check_finite(every_loss, norms)
        figures = _means(every_loss)
        images = sum(part[1] for part in gathered)
        skipped = sum(part[2] for part in gathered)
        figures["grad_norm"] = sum(value for _, value in norms) / max(num_steps, 1)
        figures["images_per_second"] = images / max(seconds, 1e-9)
        figures["step_seconds"] = seconds / max(num_steps, 1)
        figures["data_wait_share"] = sum(part[3] for part in gathered) / len(gathered)
        figures["skipped_samples"] = float(skipped)
        return figures


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
    a URL, where files cannot grow, it is written anew.
    """

    def __init__(self, path: str, first_step: int) -> None:
        self._path, self._first_step = path, first_step
        self._lines: list[str] = []

    def read(self) -> list[dict[str, float]]:
        """Drop the lines after the first step; what is left. OSError if it cannot be written."""
        if self._first_step > 0 and exists(self._path):
            lines = read_bytes(self._path).decode().splitlines()
            self._lines = [line for line in lines if _step_of(line) <= self._first_step]
        self._rewrite()
        return [json.loads(line) for line in self._lines]

    def append(self, step: int, figures: Mapping[str, float]) -> None:
        self._lines.append(json.dumps({"step": step, **figures}))
        if is_url(self._path):
            self._rewrite()
        else:
            with open(self._path, "a") as file:
                file.write(self._lines[-1] + "\n")

    def _rewrite(self) -> None:
        content = "".join(f"{line}\n" for line in self._lines).encode()
        if is_url(self._path):
            with open_file(self._path, "wb") as file:
                file.write(content)
        else:
            write_atomically(self._path, content)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut short by a kill
