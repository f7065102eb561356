import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memseg_dist import dist
from memseg_dist.nn.batchnorm import (
    check_recorded,
    commit_statistics,
    leave_out,
    record_batchnorm,
    recording,
)


def full(value: float) -> torch.Tensor:
    return torch.full((2, 3, 4, 4), value)


def expected_mean(layer: nn.BatchNorm2d, inputs: list[torch.Tensor], momentum: float = 0.1):
    """Slow definition: running statistics moved once, by the mean of the inputs' statistics."""
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs])
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(dim=1) for x in inputs])
    mean = (1 - momentum) * layer.running_mean + momentum * means.mean(dim=0)
    return mean, (1 - momentum) * layer.running_var + momentum * variances.mean(dim=0)


def passes_of(step: int, slot: int) -> list[torch.Tensor]:
    """One or two forward passes, by slot."""
    generator = torch.Generator().manual_seed(10 * step + slot)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(1 + slot % 2)]


def run_batchnorm(num_slots: int):
    torch.manual_seed(0)
    model = record_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for step in range(3):
        slots: list[int | None] = [*range(dist.rank(), num_slots, dist.size())]
        slots += [None] * (-(-num_slots // dist.size()) - len(slots))
        for slot in slots:
            with recording(model, slot):
                for x in passes_of(step, slot or 0):
                    model(x)
        commit_statistics(model)
    return model[1].running_mean, model[1].running_var


def test_running_statistics_do_not_depend_on_the_number_of_workers(process_pool):
    mean, variance = run_batchnorm(5)
    assert (mean - 0).abs().max() > 0
    for world_size in (2, 3):
        for got_mean, got_variance in process_pool(world_size).run(run_batchnorm, 5):
            assert torch.equal(got_mean, mean) and torch.equal(got_variance, variance)


def test_running_statistics_move_by_the_mean_over_every_forward_pass_of_every_slot():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    plain = nn.BatchNorm2d(4)
    for step in range(3):
        inputs = [conv(x) for slot in range(5) for x in passes_of(step, slot)]
        plain.running_mean, plain.running_var = expected_mean(plain, inputs)
    mean, variance = run_batchnorm(5)
    torch.testing.assert_close(mean, plain.running_mean)
    torch.testing.assert_close(variance, plain.running_var)


def test_one_slot_moves_statistics_as_batchnorm_does():
    torch.manual_seed(0)
    ours, theirs = record_batchnorm(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    with recording(ours, 0):
        torch.testing.assert_close(ours(x), theirs(x))
    commit_statistics(ours)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_a_second_forward_pass_of_a_slot_counts_as_much_as_the_first():
    layer = record_batchnorm(nn.BatchNorm2d(3, momentum=1.0))
    with recording(layer, 0):
        layer(full(10.0))
        layer(full(0.0))
    commit_statistics(layer)
    assert torch.equal(layer.running_mean, torch.full((3,), 5.0))
    with recording(layer, 1):
        layer(full(2.0))
    commit_statistics(layer)  # nothing is left of the step before
    assert torch.equal(layer.running_mean, torch.full((3,), 2.0))


def test_forward_passes_outside_of_recording_do_not_count():
    layer = record_batchnorm(nn.BatchNorm2d(3, momentum=1.0))
    layer(full(7.0))
    with recording(layer, 0):
        layer(full(1.0))
        layer.eval()
        layer(full(8.0))
        layer.train()
    with recording(layer, None):
        layer(full(9.0))
        with leave_out(layer, "strong view"):
            layer(full(9.0))
    layer(full(7.0))
    commit_statistics(layer)
    assert torch.equal(layer.running_mean, torch.ones(3))


def test_a_slot_that_fails_ends_its_recording():
    layer = record_batchnorm(nn.BatchNorm2d(3, momentum=1.0))
    with pytest.raises(RuntimeError, match="planted"), recording(layer, 0):
        raise RuntimeError("planted")
    layer(full(1.0))
    commit_statistics(layer)
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_a_stream_that_is_left_out_moves_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0), nn.BatchNorm2d(3))
    record_batchnorm(model)
    for slot in range(2):
        with recording(model, slot):
            with leave_out(model, "strong view"):
                normed = model(full(50.0) + torch.randn(2, 3, 4, 4))
                assert normed.abs().max() < 10  # normalised by its own statistics all the same
                with leave_out(model, "teacher"):
                    model(full(60.0))
                model(full(50.0))
            model(full(3.0))
    with leave_out(model, "preview"):
        model(full(50.0))
    commit_statistics(model)
    assert torch.equal(model[0].running_mean, torch.full((3,), 3.0))


def test_what_activation_checkpointing_computes_again_does_not_count():
    torch.manual_seed(0)
    plain = record_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    again = copy.deepcopy(plain)
    calls = []
    again[1].register_forward_hook(lambda *_: calls.append(1))
    for slot in range(2):
        x = torch.randn(2, 3, 8, 8)
        with recording(plain, slot):
            loss = plain(x).square().mean()
        loss.backward()
        with recording(again, slot):
            loss = checkpoint(again, x, use_reentrant=False).square().mean()
        loss.backward()
    assert len(calls) == 4  # every forward pass was made again
    commit_statistics(plain)
    commit_statistics(again)
    assert torch.equal(plain[1].running_mean, again[1].running_mean)
    assert torch.equal(plain[1].running_var, again[1].running_var)


def run_two_sources():
    """Rank r trains head r alone; nobody trains head 2. Returns the heads' running means."""
    heads = record_batchnorm(nn.ModuleList(nn.BatchNorm2d(3, momentum=1.0) for _ in range(3)))
    heads[2].running_mean.fill_(4.0)
    for slot in range(dist.rank(), 2, dist.size()):
        with recording(heads, slot):
            heads[slot](full(slot + 1.0))
    commit_statistics(heads)
    return [head.running_mean[0].item() for head in heads]


def test_a_layer_that_no_slot_trained_stays(process_pool):
    assert run_two_sources() == [1.0, 2.0, 4.0]
    assert process_pool(2).run(run_two_sources) == 2 * [[1.0, 2.0, 4.0]]


def test_a_layer_that_nobody_records_is_named():
    model = nn.ModuleDict({"backbone": nn.BatchNorm2d(3), "head": nn.BatchNorm1d(3)})
    with pytest.raises(ValueError, match=r"BatchNorm backbone, head of ModuleDict.*record_batchno"):
        check_recorded(model)
    record_batchnorm(model["backbone"])
    with pytest.raises(ValueError, match="BatchNorm head of"):
        check_recorded(model)
    model["head"] = nn.BatchNorm1d(3, track_running_stats=False)
    check_recorded(model)
    check_recorded(record_batchnorm(timm.create_model("test_resnet")))
    with pytest.raises(ValueError, match="momentum=None"):
        record_batchnorm(nn.BatchNorm2d(3, momentum=None))
