"""Schedule and parameter groups."""

from __future__ import annotations

import pytest
import torch
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


def test_stepwise_schedule_falls_at_its_milestones():
    config = OptimizerConfig(lr=1e-3, schedule="step", milestones=(5, 10), warmup_steps=1)
    rates = [learning_rate(config, step, 30) for step in range(30)]
    assert rates[0] == pytest.approx(5e-4)
    assert rates[1:5] == pytest.approx([1e-3] * 4)
    assert rates[5:10] == pytest.approx([1e-4] * 5)
    assert rates[10:] == pytest.approx([1e-5] * 20)
    gentle = OptimizerConfig(lr=1.0, schedule="step", milestones=(2,), decay=0.5)
    assert [learning_rate(gentle, step, 4) for step in range(4)] == [1.0, 1.0, 0.5, 0.5]
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="step"), 3, 4) == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"milestones": (5,)}, r"milestones is \(5,\); it must be empty unless optimizer.schedule"),
        (
            {"schedule": "step", "milestones": (5, 5)},
            r"\(5, 5\); it must be ascending steps above 0",
        ),
        (
            {"schedule": "step", "milestones": (0, 5)},
            r"\(0, 5\); it must be ascending steps above 0",
        ),
        ({"schedule": "step", "decay": 0.0}, "decay is 0.0; it must be above 0"),
        ({"kind": "adamw", "nesterov": True}, "nesterov is True; it must be False unless"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov is True; it must be False unless"),
        ({"bias_lr_scale": -1.0}, "bias_lr_scale is -1.0; it must be 0 or more"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_biases_have_a_rate_of_their_own_and_everything_may_decay():
    method = Tiny()
    config = OptimizerConfig(
        lr=2.0, weight_decay=0.1, backbone_lr_scale=0.5, bias_lr_scale=2.0,
        decay_norms_and_biases=True, nesterov=True,
    )  # fmt: skip
    optimizer = build_optimizer(method, config)
    set_learning_rate(optimizer, 2.0)
    found = {
        id(parameter): (group["weight_decay"], group["lr"], group["nesterov"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in method.named_parameters():
        lr = (1.0 if name.startswith("backbone.") else 2.0) * (2 if name.endswith("bias") else 1)
        assert found[id(parameter)] == (0.1, lr, True), name


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
    method.requires_grad_(False)
    with pytest.raises(ValueError, match="Tiny has no parameter to train"):
        build_optimizer(method, OptimizerConfig())


class Trunk(Tiny):
    """Its backbone goes by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = self.backbone
        del self.backbone

    def parameter_groups(self):
        return {"backbone": [self.trunk]}


class Nameless(Trunk):
    def parameter_groups(self):
        return {}


def test_the_backbones_rate_goes_by_module_and_a_scale_for_nothing_is_an_error():
    method, config = Trunk(), OptimizerConfig(lr=1.0, backbone_lr_scale=0.5)
    slow = {
        id(parameter)
        for group in build_optimizer(method, config).param_groups
        for parameter in group["params"]
        if group["lr_scale"] == 0.5
    }
    assert slow == {id(parameter) for parameter in method.trunk.parameters()}
    with pytest.raises(ValueError, match=r"backbone_lr_scale is 0.5, but no parameter to train is"):
        build_optimizer(Nameless(), config)
    method.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match=r"backbone_lr_scale is 0.5, but no parameter to train is"):
        build_optimizer(method, config)
    build_optimizer(Nameless(), OptimizerConfig())  # nothing is to be scaled


def test_adamw_takes_its_betas():
    optimizer = build_optimizer(Tiny(), OptimizerConfig(kind="adamw", betas=(0.8, 0.95)))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
