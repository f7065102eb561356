"""Turns slots into one optimizer step, whatever the number of workers.

    engine = TorchEngine(method, config, device)
    for batch, clock in slots_of_this_rank:
        losses = engine(batch, clock)
        engine.backward(sum(losses.values()), clock)
    grad_norm = engine.step(lr)

The gradient is (1 / S) * sum over the S slots of all ranks of the slot's loss; a repeated (idle)
slot weighs 0. `TorchEngine` is the plain twin that `runtime.on_deepspeed` is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Batch, Clock
from memseg_dist.config import RunConfig
from memseg_dist.methods.method import Method
from memseg_dist.models.batchnorm import set_slot
from memseg_dist.train import optim

BUCKET_BYTES = 64 * 2**20
"""Gradients travel in flat buckets of about this size."""


@dataclass
class EngineState:
    """All that an engine would lose; free of the number of workers and of the engine's kind.

    weights: parameters and persistent buffers by name, fp32 on the host. optimizer: `KEY/PARAMETER`
    tensors of the parameter's shape, and `step`. Empty on every rank but 0.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


class Engine(Protocol):
    def __call__(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The method's losses of one slot, with the slot's own random numbers."""
        ...

    def backward(self, loss: Tensor, clock: Clock) -> None:
        """Add one slot's gradient to this rank's sum. No communication."""
        ...

    def step(self, lr: float) -> Tensor:
        """Reduce, clip, update. Returns the gradient's L2 norm before clipping, []. Collective."""
        ...

    def state(self) -> EngineState:
        """Collective: ranks may hold parts of the optimizer's state."""
        ...

    def load(self, state: EngineState) -> None:
        """Take over a whole state, the same on every rank."""
        ...


EngineFactory = Callable[[Method, RunConfig, torch.device], Engine]


def prepare_slot(method: Method, clock: Clock) -> None:
    """What every forward pass of a slot starts with, on any engine."""
    torch.manual_seed(clock.seed_for("forward"))  # dropout and drop-path: by slot, not by worker
    set_slot(method, None if clock.idle else clock.slot)


def preview_step(
    method: Method, slots: Sequence[tuple[Batch, Clock]], precision: str, clock: Clock
) -> None:
    """Let the method look at all slots of the step before their losses, if it wants to. Collective.

    slots: this rank's, on the device.
    """
    if not method.previews(clock):
        return
    for batch, slot_clock in slots:
        prepare_slot(method, slot_clock)
        device_type = batch.images.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
            method.preview(batch, slot_clock)
    method.exchange(clock)


def loss_weight(clock: Clock) -> float:
    return 0.0 if clock.idle else 1.0 / clock.num_slots


def load_weights(method: Method, weights: Mapping[str, Tensor]) -> None:
    """ValueError naming what does not fit."""
    try:
        method.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ValueError(
            f"the saved weights do not fit this run's {type(method).__name__}: {error}"
        ) from error


def host_weights(method: Method) -> dict[str, Tensor]:
    """Weights and buffers on rank 0's host; nothing elsewhere."""
    if dist.rank() != 0:
        return {}
    return {name: tensor.detach().cpu().clone() for name, tensor in method.state_dict().items()}


class TorchEngine:
    """Every rank holds everything; gradients are summed in fp32."""

    def __init__(self, method: Method, config: RunConfig, device: torch.device) -> None:
        self.method, self.config, self.device = method, config, device
        self.optimizer = optim.build_optimizer(method, config.optimizer)
        self._named = optim.trainable(method)
        parameters: list[Tensor] = [parameter for _, parameter in self._named]
        optim.initialise_state(self.optimizer, config.optimizer, parameters)
        self._buckets = _buckets(parameters)

    def __call__(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        prepare_slot(self.method, clock)
        is_bf16 = self.config.engine.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
            return self.method(batch, clock)

    def backward(self, loss: Tensor, clock: Clock) -> None:
        (loss * loss_weight(clock)).backward()

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        optim.fill_missing_gradients(self.method)
        if dist.size() > 1:
            for bucket in self._buckets:
                _reduce(bucket)
        clip_norm = self.config.optimizer.clip_norm or float("inf")
        parameters = [parameter for _, parameter in self._named]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optim.set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> EngineState:
        return EngineState(
            host_weights(self.method),
            replicated_state(self.optimizer, self._named, self.config) if dist.rank() == 0 else {},
        )

    def load(self, state: EngineState) -> None:
        load_weights(self.method, state.weights)
        load_replicated_state(self.optimizer, self._named, self.config, state.optimizer)


def replicated_state(
    optimizer: torch.optim.Optimizer, named: list, config: RunConfig
) -> dict[str, Tensor]:
    """State of an optimizer that holds whole parameters, on the host, by parameter name."""
    saved = {
        f"{key}/{name}": optimizer.state[parameter][key].detach().cpu().clone()
        for name, parameter in named
        for key in optim.state_keys(config.optimizer)
    }
    if config.optimizer.kind == "adamw":
        saved["step"] = optim.get_update_count(optimizer)
    return saved


def load_replicated_state(
    optimizer: torch.optim.Optimizer, named: list, config: RunConfig, saved: Mapping[str, Tensor]
) -> None:
    for name, parameter in named:
        for key in optim.state_keys(config.optimizer):
            tensor = optim.read_state(saved, key, name, parameter.shape)
            optimizer.state[parameter][key].copy_(tensor)
    if config.optimizer.kind == "adamw":
        optim.set_update_count(optimizer, saved["step"])


def _buckets(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters in order, cut into runs of about BUCKET_BYTES."""
    buckets: list[list[Tensor]] = [[]]
    num_bytes = 0
    for parameter in parameters:
        if num_bytes >= BUCKET_BYTES:
            buckets.append([])
            num_bytes = 0
        buckets[-1].append(parameter)
        num_bytes += parameter.numel() * parameter.element_size()
    return buckets


def _reduce(bucket: list[Tensor]) -> None:
    """Sum the gradients of `bucket` over the ranks, in place. Collective."""
    gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
    flat = dist.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
