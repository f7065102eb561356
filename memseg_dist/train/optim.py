"""Learning-rate schedule, parameter groups, and optimizer state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memseg_dist.config import OptimizerConfig

STATE_KEYS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step 0 .. steps - 1: a linear warm-up times the schedule.

    "poly" decays polynomially to min_lr; "step" multiplies by `decay` at each milestone passed.
    """
    if config.schedule == "step":
        lr = config.lr * config.decay ** sum(step >= milestone for milestone in config.milestones)
    else:
        decay = (1 - step / steps) ** config.power
        lr = (config.lr - config.min_lr) * decay + config.min_lr
    if step < config.warmup_steps:
        lr *= (step + 1) / (config.warmup_steps + 1)
    return lr


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Groups by weight decay (as a rule none for tensors of fewer than two axes) and rate scale."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable(module):
        is_decayed = parameter.ndim > 1 or config.decay_norms_and_biases
        decay = config.weight_decay if is_decayed else 0.0
        scale = config.backbone_lr_scale if name.startswith("backbone.") else 1.0
        if parameter.ndim <= 1 and name.split(".")[-1] == "bias":
            scale *= config.bias_lr_scale
        groups.setdefault((decay, scale), []).append(parameter)
    if not groups:
        raise ValueError(f"{type(module).__name__} has no parameter to train")
    options = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]
    if config.kind == "sgd":
        return torch.optim.SGD(
            options, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )
    return torch.optim.AdamW(options, lr=config.lr, betas=config.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def fill_missing_gradients(module: nn.Module) -> None:
    """Zeros where this rank's slots did not use a parameter: all ranks reduce the same tensors."""
    for _, parameter in trainable(module):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def initialise_state(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, tensors: list[Tensor]
) -> None:
    """The state before the first step, written out: an update from it equals one from no state."""
    for tensor in tensors:
        state = optimizer.state[tensor]
        for key in state_keys(config):
            state[key] = torch.zeros_like(tensor)
        if config.kind == "adamw":
            state["step"] = torch.tensor(0.0)


def state_keys(config: OptimizerConfig) -> tuple[str, ...]:
    """Names of the tensors that the optimizer keeps per parameter, of the parameter's shape."""
    return () if config.kind == "sgd" and config.momentum == 0 else STATE_KEYS[config.kind]


def get_update_count(optimizer: torch.optim.Optimizer) -> Tensor:
    """How many updates AdamW has made: float32 []; every tensor has had the same number."""
    return next(iter(optimizer.state.values()))["step"].clone()


def set_update_count(optimizer: torch.optim.Optimizer, count: Tensor) -> None:
    for state in optimizer.state.values():
        state["step"].copy_(count)


def read_state(saved: Mapping[str, Tensor], key: str, name: str, shape: torch.Size) -> Tensor:
    """The saved tensor `key` of parameter `name`; ValueError if it is missing or does not fit."""
    tensor = saved.get(f"{key}/{name}")
    if tensor is None or tensor.shape != shape:
        found = "nothing" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
        raise ValueError(
            f"optimizer state '{key}' of parameter '{name}' {tuple(shape)}: the checkpoint has "
            f"{found}; resume with the method and optimizer that wrote it"
        )
    return tensor
