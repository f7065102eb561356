"""Engines: DeepSpeed against the plain twin, at any number of workers and any ZeRO stage."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from train.tiny import NUM_SLOTS, Tiny, micro_batches, tiny_config

from memseg_dist import dist
from memseg_dist.config import EngineConfig, OptimizerConfig
from memseg_dist.nn.batchnorm import commit_statistics
from memseg_dist.platforms.on_deepspeed import DeepSpeedEngine
from memseg_dist.train.engine import EngineState, TorchEngine

CPU = torch.device("cpu")
SGD = OptimizerConfig(kind="sgd", lr=0.1, weight_decay=0.01, clip_norm=0.5, backbone_lr_scale=0.5)
ADAMW = OptimizerConfig(kind="adamw", lr=0.01, weight_decay=0.05)


def build(kind, optimizer, stage=0, fused=None):
    config = tiny_config(optimizer, EngineConfig(kind, zero_stage=stage, fused_optimizer=fused))
    engine = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}[kind](Tiny(), config, CPU)
    held = engine.optimizer if kind == "torch" else engine._optimizer
    assert bool(held.defaults["fused"]) == bool(fused)
    return engine


def steps(engine, start, stop):
    """Loss per (step, slot) of this rank and the gradient norm per step."""
    losses, norms = {}, []
    for step in range(start, stop):
        for batch, clock in micro_batches(step, dist.rank(), dist.size()):
            loss = sum(engine(batch, clock).values())
            engine.backward(loss, clock)
            if not clock.idle:
                losses[step, clock.slot] = loss.item()
        norms.append(float(engine.step(engine.config.optimizer.lr / (1 + step))))
        commit_statistics(engine.method)
    return losses, norms


def run(kind, optimizer, stage, num_steps=4):
    engine = build(kind, optimizer, stage)
    losses, norms = steps(engine, 0, num_steps)
    state = engine.state()
    return losses, norms, dict(state.weights), dict(state.optimizer)


def continue_run(kind, optimizer, stage, state, start, stop, fused=None):
    engine = build(kind, optimizer, stage, fused)
    if state is not None:
        engine.load(EngineState(*state))
    losses, _ = steps(engine, start, stop)
    state = engine.state()
    return losses, (dict(state.weights), dict(state.optimizer))


def merged(results):
    losses = {}
    for result in results:
        losses |= result[0]
    return losses


def assert_close(found, wanted, tolerance=2e-6):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            torch.as_tensor(found[key]), torch.as_tensor(value), rtol=tolerance, atol=tolerance
        )


@pytest.fixture(scope="module")
def reference():
    return {name: run("torch", optimizer, 0) for name, optimizer in OPTIMIZERS.items()}


OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}
CASES = [("torch", 0, 2), ("torch", 0, 3)]
CASES += [("deepspeed", stage, size) for size in (1, 2, 3) for stage in (0, 1, 2)]


@pytest.mark.parametrize("kind, stage, size", CASES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_any_engine_at_any_size_trains_alike(process_pool, reference, optimizer, kind, stage, size):
    results = process_pool(size).run(run, kind, OPTIMIZERS[optimizer], stage)
    wanted_losses, wanted_norms, wanted_weights, wanted_state = reference[optimizer]
    if stage == 0:
        assert merged(results) == wanted_losses
        assert all(norms == wanted_norms for _, norms, _, _ in results)
        assert_close(results[0][2], wanted_weights, 0)
        assert_close(results[0][3], wanted_state, 0)
        return
    assert_close(merged(results), wanted_losses)
    for _, norms, _, _ in results:
        assert norms == pytest.approx(wanted_norms, rel=1e-5)
    # Adam divides by the root of tiny second moments: rounding of a gradient grows in the update
    assert_close(results[0][2], wanted_weights, 2e-6 if optimizer == "sgd" else 1e-4)
    assert_close(results[0][3], wanted_state, 2e-6 if optimizer == "sgd" else 1e-4)


FUSED = [("torch", 0), ("deepspeed", 0), ("deepspeed", 2)]


@pytest.mark.parametrize("kind, stage", FUSED)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fused_optimizer_trains_alike_and_goes_on(
    process_pool, reference, optimizer, kind, stage
):
    """Its state is that of the other: the last steps are taken by one that is not fused."""
    config = OPTIMIZERS[optimizer]
    first = process_pool(1).run(continue_run, kind, config, stage, None, 0, 2, True)
    second = process_pool(1).run(continue_run, "torch", config, 0, first[0][1], 2, 3)
    third = process_pool(1).run(continue_run, kind, config, stage, second[0][1], 3, 4, True)
    assert_close(merged([*first, *second, *third]), reference[optimizer][0])
    assert_close(third[0][1][0], reference[optimizer][2], 1e-4)
    assert_close(third[0][1][1], reference[optimizer][3], 1e-4)


NESTEROV = OptimizerConfig(
    kind="sgd", lr=0.1, weight_decay=0.01, nesterov=True, backbone_lr_scale=0.5, bias_lr_scale=2.0,
    decay_norms_and_biases=True, schedule="step", milestones=(2,),
)  # fmt: skip


@pytest.mark.parametrize(
    "kind, stage, size", [("torch", 0, 2), ("deepspeed", 0, 2), ("deepspeed", 2, 3)]
)
def test_nesterov_and_rates_of_biases_train_alike_and_move_on(process_pool, kind, stage, size):
    """The last two of four steps are taken by another engine, from the saved state."""
    wanted, _, wanted_weights, wanted_state = run("torch", NESTEROV, 0)
    first = process_pool(size).run(continue_run, kind, NESTEROV, stage, None, 0, 2)
    second = process_pool(2).run(continue_run, "deepspeed", NESTEROV, 1, first[0][1], 2, 4)
    assert_close(merged([*first, *second]), wanted)
    assert_close(second[0][1][0], wanted_weights)
    assert_close(second[0][1][1], wanted_state)
    plain = run("torch", dataclasses.replace(NESTEROV, nesterov=False), 0)
    assert plain[0] != wanted


def test_the_gradient_is_the_mean_over_slots_of_an_explicit_sum():
    method, engine = Tiny(), build("torch", OptimizerConfig(lr=0.1, momentum=0.0))
    total = 0
    for batch, clock in micro_batches(0, 0, 1):
        clock.seed_forward()
        total = total + sum(method(batch, clock).values()) / NUM_SLOTS
    total.backward()
    before = {name: p.detach().clone() for name, p in engine.method.named_parameters()}
    for batch, clock in micro_batches(0, 0, 1):
        engine.backward(sum(engine(batch, clock).values()), clock)
    engine.step(0.1)
    for name, parameter in engine.method.named_parameters():
        wanted = before[name] - 0.1 * method.get_parameter(name).grad
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_state_moves_between_sizes_kinds_and_stages(process_pool, reference, optimizer):
    config = OPTIMIZERS[optimizer]
    first = process_pool(2).run(continue_run, "deepspeed", config, 2, None, 0, 1)
    second = process_pool(1).run(continue_run, "torch", config, 0, first[0][1], 1, 2)
    third = process_pool(3).run(continue_run, "deepspeed", config, 0, second[0][1], 2, 3)
    fourth = process_pool(2).run(continue_run, "deepspeed", config, 1, third[0][1], 3, 4)
    assert_close(merged([*first, *second, *third, *fourth]), reference[optimizer][0])


def test_deepspeed_times_no_throughput():
    """Its timer waits for the device at the start and end of every slot."""
    engine = build("deepspeed", SGD)
    assert not engine._engine.tput_timer.config.enabled


def test_state_that_does_not_fit_is_refused():
    engine = build("torch", SGD)
    state = engine.state()
    broken = {name: t for name, t in state.optimizer.items() if "source1.bias" not in name}
    with pytest.raises(ValueError, match=r"heads.source1.bias.*resume with the method and"):
        engine.load(EngineState(state.weights, broken))
    weights = {name: t for name, t in state.weights.items() if name != "heads.source1.bias"}
    with pytest.raises(ValueError, match=r"do not fit this run's Tiny(.|\n)*heads.source1.bias"):
        engine.load(EngineState(weights, state.optimizer))
