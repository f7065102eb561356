"""Schedule and parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train.tiny import Tiny

from memseg_dist.config import OptimizerConfig
from memseg_dist.train.optim import build_optimizer, learning_rate, set_learning_rate


def test_poly_schedule_is_the_papers():
    config = OptimizerConfig(lr=1e-3, power=0.9, min_lr=1e-5)
    for step in (0, 1, 5_000, 319_999):
        wanted = (1e-3 - 1e-5) * (1 - step / 320_000) ** 0.9 + 1e-5
        assert learning_rate(config, step, 320_000) == wanted
    assert learning_rate(config, 0, 320_000) == 1e-3


def test_warm_up_rises_to_the_schedule():
    plain = OptimizerConfig(lr=1.0, min_lr=0.0)
    warm = OptimizerConfig(lr=1.0, min_lr=0.0, warmup_steps=3)
    rates = [learning_rate(warm, step, 100) for step in range(5)]
    assert rates[:3] == [
        pytest.approx(learning_rate(plain, step, 100) * share)
        for step, share in enumerate((0.25, 0.5, 0.75))
    ]
    assert rates[3:] == [learning_rate(plain, step, 100) for step in (3, 4)]


def test_groups_hold_every_parameter_once_with_its_decay_and_scale():
    method = Tiny()
    config = OptimizerConfig(lr=2.0, weight_decay=0.1, backbone_lr_scale=0.5)
    optimizer = build_optimizer(method, config)
    set_learning_rate(optimizer, 2.0)
    found = {
        id(parameter): (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == len(list(method.parameters()))
    for name, parameter in method.named_parameters():
        decay = 0.1 if parameter.ndim > 1 else 0.0
        lr = 1.0 if name.startswith("backbone.") else 2.0
        assert found[id(parameter)] == (decay, lr), name


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error():
    method = Tiny()
    method.backbone.requires_grad_(False)
    optimizer = build_optimizer(method, OptimizerConfig())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in method.backbone.parameters()}
    with pytest.raises(ValueError, match="ReLU has no parameter to train"):
        build_optimizer(nn.ReLU(), OptimizerConfig())


def test_adamw_takes_its_betas():
    optimizer = build_optimizer(Tiny(), OptimizerConfig(kind="adamw", betas=(0.8, 0.95)))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
