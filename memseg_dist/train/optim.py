"""Learning-rate schedule, parameter groups, and optimizer state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memseg_dist import dist
from memseg_dist.config import OptimizerConfig
from memseg_dist.methods.method import Method

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


def build_optimizer(
    method: Method, config: OptimizerConfig, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Groups by weight decay (as a rule none for tensors of fewer than two axes) and rate scale.

    fused: one kernel for all parameters.

    ValueError if nothing can be trained, or if a scale is set for a group that has no parameter.
    """
    backbone = {
        id(parameter)
        for module in method.parameter_groups().get("backbone", ())
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    if not backbone and config.backbone_lr_scale != 1:
        raise ValueError(
            f"optimizer.backbone_lr_scale is {config.backbone_lr_scale}, but no parameter to train "
            f"is in the group 'backbone' of {type(method).__name__}.parameter_groups(), which has "
            f"{sorted(method.parameter_groups())}; leave the scale at 1, or name the modules there"
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable(method).items():
        is_decayed = parameter.ndim > 1 or config.decay_norms_and_biases
        decay = config.weight_decay if is_decayed else 0.0
        scale = config.backbone_lr_scale if id(parameter) in backbone else 1.0
        if parameter.ndim <= 1 and name.split(".")[-1] == "bias":
            scale *= config.bias_lr_scale
        groups.setdefault((decay, scale), []).append(parameter)
    if not groups:
        raise ValueError(f"{type(method).__name__} has no parameter to train")
    options = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]
    more: dict[str, Any] = {"fused": True} if fused else {}
    if config.kind == "sgd":
        return torch.optim.SGD(
            options, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, **more
        )
    return torch.optim.AdamW(options, lr=config.lr, betas=config.betas, **more)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def fill_missing_gradients(module: nn.Module) -> None:
    """Zeros where this rank's slots did not use a parameter: all ranks reduce the same tensors."""
    for parameter in trainable(module).values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def initialise_state(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, tensors: Iterable[Tensor]
) -> None:
    """The state before the first step, written out: an update from it equals one from no state."""
    for tensor in tensors:
        state = optimizer.state[tensor]
        for key in state_keys(config):
            state[key] = torch.zeros_like(tensor)
        if config.kind == "adamw":
            # a fused update counts on the device
            is_fused = optimizer.defaults.get("fused")
            state["step"] = torch.zeros((), device=tensor.device if is_fused else "cpu")


def state_keys(config: OptimizerConfig) -> tuple[str, ...]:
    """Names of the tensors that the optimizer keeps per parameter, of the parameter's shape."""
    return () if config.kind == "sgd" and config.momentum == 0 else STATE_KEYS[config.kind]


def whole_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """State of an optimizer that holds whole parameters, on rank 0's host; nothing elsewhere."""
    if dist.rank() != 0:
        return {}
    return update_count(optimizer) | {
        f"{key}/{name}": tensor.detach().to("cpu", copy=True)
        for name, parameter in named.items()
        for key, tensor in optimizer.state[parameter].items()
        if key != "step"
    }


def load_whole_state(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
) -> None:
    for name, parameter in named.items():
        for key, tensor in optimizer.state[parameter].items():
            if key != "step":
                tensor.copy_(read_state(saved, key, name, parameter.shape))
    load_update_count(optimizer, saved)


def update_count(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's {"step": float32 []}, the same for every tensor; nothing for SGD."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return {"step": counts[0].cpu().clone()} if counts else {}


def load_update_count(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].copy_(read_state(saved, "step", "", state["step"].shape))


def read_state(saved: Mapping[str, Tensor], key: str, name: str, shape: torch.Size) -> Tensor:
    """The saved tensor `key` of parameter `name` ("": of all); ValueError if it does not fit."""
    tensor = saved.get(f"{key}/{name}" if name else key)
    if tensor is None or tensor.shape != shape:
        found = "nothing" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
        raise ValueError(
            f"optimizer state '{key}' of parameter '{name}' {tuple(shape)}: the checkpoint has "
            f"{found}; resume with the method and optimizer that wrote it"
        )
    return tensor
