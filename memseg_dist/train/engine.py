"""Turns slots into one optimizer step, whatever the number of workers.

    engine = TorchEngine(method, config, device)
    for batch, clock in slots_of_this_rank:
        losses = engine(batch, clock)
        engine.backward(sum(losses.values()), clock)
    grad_norm = engine.step(lr)

The gradient is (1 / S) * sum over the S slots of all ranks of the slot's loss; a repeated (idle)
slot weighs 0. `TorchEngine` is the plain twin that `platforms.on_deepspeed` is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Batch, Clock
from memseg_dist.config import RunConfig
from memseg_dist.methods.method import Method
from memseg_dist.nn.batchnorm import recording
from memseg_dist.train import optim
from memseg_dist.train.gradients import GradientSum


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
        """Add one slot's gradient to the step's sum. Collective: every rank has as many slots."""
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


@contextmanager
def slot_forward(method: Method, clock: Clock) -> Iterator[None]:
    """What surrounds the forward pass of a slot on any engine: its random numbers, and its
    BatchNorm statistics, which an idle repeat does not count towards.
    """
    clock.seed_forward()
    with recording(method, None if clock.idle else clock.slot):
        yield


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
    return {
        name: tensor.detach().to("cpu", copy=True) for name, tensor in method.state_dict().items()
    }


class TorchEngine:
    """Every rank holds everything; gradients are summed in fp32."""

    def __init__(self, method: Method, config: RunConfig, device: torch.device) -> None:
        self.method, self.config, self.device = method, config, device
        settings = config.engine.on(device)
        fused, in_order = bool(settings.fused_optimizer), bool(settings.ordered_sums)
        self.optimizer = optim.build_optimizer(method, config.optimizer, fused=fused)
        self._named = optim.trainable(method)
        optim.initialise_state(self.optimizer, config.optimizer, [*self._named.values()])
        self._gradients = GradientSum([*self._named.values()], in_order=in_order)

    def __call__(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        with slot_forward(self.method, clock):
            return self.method(batch, clock)

    def backward(self, loss: Tensor, clock: Clock) -> None:
        (loss * loss_weight(clock)).backward()
        self._gradients.add_slot()

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        self._gradients.finish()
        optim.fill_missing_gradients(self.method)
        clip_norm = self.config.optimizer.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._named.values(), clip_norm)
        optim.set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> EngineState:
        return EngineState(
            host_weights(self.method), optim.whole_state(self.optimizer, self._named)
        )

    def load(self, state: EngineState) -> None:
        load_weights(self.method, state.weights)
        optim.load_whole_state(self.optimizer, self._named, state.optimizer)
