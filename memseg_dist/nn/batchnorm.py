"""BatchNorm that does not know how many workers there are.

A slot is what one GPU was in the papers: training normalises within the slot, as BatchNorm does,
and the running statistics move once per optimizer step, by the mean over all recorded forward
passes of all slots of all ranks.

    record_batchnorm(model)                         # once, after building
    with recording(model, slot):                    # slot None: idle, records nothing
        model(batch)
        with leave_out(model, "strong view"):
            model(other_view)                       # does not move the running statistics
    commit_statistics(model)                        # collective, once per step

Only what runs inside `recording` counts: not a preview, not evaluation, not what activation
checkpointing computes again during the backward pass. It works on any BatchNorm class (timm's fused
ones too): the layer's own momentum is 0, so its running statistics stay put, but for a recorded
pass it writes to others, which hooks keep beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memseg_dist.batch import Clock
from memseg_dist.memory.proposals import Proposals


@dataclass
class SlotStatistics:
    """What one BatchNorm layer saw since the last commit.

    slot: the slot that is recorded now. stream: the name of the stream that is left out now.
    seen: slot -> the [2, C] mean and variance of each of its forward passes. running: the layer's
    running statistics while a pass is recorded that must not move them.
    """

    momentum: float
    slot: int | None = None
    stream: str | None = None
    seen: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    running: tuple[Tensor, Tensor] | None = None


def record_batchnorm(module: nn.Module) -> nn.Module:
    """Make every BatchNorm of `module` record per slot, in place. Returns the module."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and not hasattr(layer, "slot_statistics"):
            if layer.momentum is None or layer.running_mean is None:
                raise ValueError(
                    f"BatchNorm with momentum={layer.momentum} and "
                    f"track_running_stats={layer.track_running_stats}: its running statistics "
                    "cannot be kept independent of the number of workers"
                )
            layer.slot_statistics = SlotStatistics(layer.momentum)  # type: ignore[assignment]
            layer.momentum = 0.0
            layer.register_forward_pre_hook(_before)
            layer.register_forward_hook(_after, always_call=True)
    return module


def check_recorded(module: nn.Module) -> None:
    """ValueError naming each BatchNorm whose running statistics nobody records."""
    silent = [
        name or "the module itself"
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.running_mean is not None
        and not hasattr(layer, "slot_statistics")
    ]
    if silent:
        raise ValueError(
            f"BatchNorm {', '.join(silent)} of {type(module).__name__} keeps running statistics of "
            "its own, which would depend on the number of workers; call `record_batchnorm` on it "
            "where it is built"
        )


def recording(module: nn.Module, slot: int | None) -> AbstractContextManager[None]:
    """Forward passes inside count as those of `slot`; None (an idle slot) records nothing."""
    return _setting(module, "slot", slot)


def leave_out(module: nn.Module, stream: str) -> AbstractContextManager[None]:
    """Forward passes inside, the stream of this name, move no statistics while recording."""
    return _setting(module, "stream", stream)


@torch.no_grad()
def commit_statistics(module: nn.Module) -> None:
    """Move all running statistics by the mean over every recorded forward pass. Collective.

    Each pass of each slot of each rank weighs the same; they are added in (slot, pass) order, which
    knows no rank.
    """
    layers = _recording_layers(module)
    if not layers:
        return
    zeros = [torch.zeros_like(layer.running_mean).expand(2, -1) for layer in layers]
    width = sum(zero.numel() for zero in zeros)
    passes = Proposals(len(layers), zeros[0].new_empty(0, width))
    for slot in sorted({slot for layer in layers for slot in layer.slot_statistics.seen}):
        of_layers = [layer.slot_statistics.seen.get(slot, []) for layer in layers]
        rows, is_seen = [], []
        for of_pass in zip_longest(*of_layers):
            is_seen.append([part is not None for part in of_pass])
            parts = [zero if part is None else part for part, zero in zip(of_pass, zeros)]
            rows.append(torch.cat([part.flatten() for part in parts]))
        passes.add(np.array(is_seen), torch.stack(rows), Clock(0, slot))
    gathered = passes.gather()
    counts = gathered.ids.sum(axis=0).tolist()
    totals = zeros[0].new_zeros(width)
    for number in gathered.order.tolist():
        totals = totals + gathered.rows[number]
    for layer, count, total in zip(layers, counts, totals.split([zero.numel() for zero in zeros])):
        if count:  # a layer that no slot trained (frozen, or of another source) stays as it is
            mean, variance = total.view(2, -1) / count
            layer.running_mean.lerp_(mean, layer.slot_statistics.momentum)
            layer.running_var.lerp_(variance, layer.slot_statistics.momentum)
        layer.num_batches_tracked.zero_()  # counts forwards, which depend on the workers
        layer.slot_statistics.seen.clear()


def _recording_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if hasattr(layer, "slot_statistics")]


@contextmanager
def _setting(module: nn.Module, name: str, value: int | str | None) -> Iterator[None]:
    every = [layer.slot_statistics for layer in _recording_layers(module)]
    before = [getattr(statistics, name) for statistics in every]
    for statistics in every:
        setattr(statistics, name, value)
    try:
        yield
    finally:
        for statistics, old in zip(every, before):
            setattr(statistics, name, old)


@torch.compiler.disable
def _before(layer: Any, arguments: tuple[Tensor, ...]) -> None:
    """Give the layer statistics to write to that are this pass's alone: BatchNorm computes them
    anyway, and with momentum 1 it keeps nothing else.
    """
    statistics: SlotStatistics = layer.slot_statistics
    if not layer.training or statistics.slot is None or statistics.stream is not None:
        return
    statistics.running = (layer.running_mean, layer.running_var)
    layer.running_mean, layer.running_var = map(torch.zeros_like, statistics.running)
    layer.momentum = 1.0


@torch.compiler.disable
def _after(layer: Any, arguments: tuple[Tensor, ...], output: Tensor | None) -> None:
    statistics: SlotStatistics = layer.slot_statistics
    if statistics.running is None:
        return
    assert statistics.slot is not None
    found = torch.stack([layer.running_mean, layer.running_var])
    layer.running_mean, layer.running_var = statistics.running
    layer.momentum, statistics.running = 0.0, None
    if output is not None:  # None: the forward pass has failed
        statistics.seen[statistics.slot].append(found)
