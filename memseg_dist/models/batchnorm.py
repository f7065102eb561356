"""BatchNorm that does not know how many workers there are.

A slot is what one GPU was in the papers: training normalises within the slot, as BatchNorm does,
and the running statistics move once per optimizer step, by the mean over all slots of all ranks.

    record_batchnorm(model)                                    # once, after building
    for each slot: set_slot(model, slot or None when idle); model(...)
    commit_statistics(model)                                   # collective, once per step

It works on any BatchNorm class (timm's fused ones too): the layer's own momentum becomes 0, so its
running statistics stay put, and a hook records each slot's statistics beside it. Recording is by
slot: a recomputed forward (activation checkpointing) records the same again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memseg_dist import dist


@dataclass
class SlotStatistics:
    """What one BatchNorm layer saw since the last commit: slot -> [2, C] mean and variance."""

    momentum: float
    slot: int | None = None
    seen: dict[int, Tensor] = field(default_factory=dict)


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
            layer.register_forward_pre_hook(_record)
    return module


def set_slot(module: nn.Module, slot: int | None) -> None:
    """Name the slot whose forward comes next; None (idle) records nothing."""
    for layer in _recording_layers(module):
        layer.slot_statistics.slot = slot


@torch.no_grad()
def commit_statistics(module: nn.Module) -> None:
    """Move all running statistics by the mean over every slot of every rank. Collective."""
    layers = _recording_layers(module)
    if not layers:
        return
    sums = []
    for layer in layers:
        seen = layer.slot_statistics.seen
        zero = torch.zeros(2, layer.num_features, device=layer.running_mean.device)
        sums.append(sum((seen[slot] for slot in sorted(seen)), zero).flatten())
    counts = torch.tensor([float(len(layer.slot_statistics.seen)) for layer in layers])
    num_slots = counts.to(sums[0].device, non_blocking=True)
    flat = dist.all_reduce_sum(torch.cat([num_slots, *sums]))
    totals = flat[len(layers) :].split([part.numel() for part in sums])
    for layer, count, total in zip(layers, flat, totals):
        old = torch.stack([layer.running_mean, layer.running_var])
        # a layer that no slot trained (frozen, or of another source) stays as it is
        mean = torch.where(count > 0, total.view(2, -1) / count.clamp_min(1), old)
        layer.running_mean.lerp_(mean[0], layer.slot_statistics.momentum)
        layer.running_var.lerp_(mean[1], layer.slot_statistics.momentum)
        layer.num_batches_tracked.zero_()  # counts forwards, which depend on the workers
        layer.slot_statistics.seen.clear()


def _recording_layers(module: nn.Module) -> list:
    return [layer for layer in module.modules() if hasattr(layer, "slot_statistics")]


@torch.no_grad()
def _record(layer, arguments: tuple[Tensor, ...]) -> None:
    statistics: SlotStatistics = layer.slot_statistics
    if not layer.training or statistics.slot is None:
        return
    (input,) = arguments
    axes = [axis for axis in range(input.ndim) if axis != 1]
    count = input.numel() // input.shape[1]
    variance, mean = torch.var_mean(input.float(), dim=axes, correction=0)
    unbiased = variance * (count / max(count - 1, 1))  # what BatchNorm keeps
    statistics.seen[statistics.slot] = torch.stack([mean, unbiased])
