"""Host arrays on their way to the device."""

from __future__ import annotations

import dataclasses

import no_host_sync
import numpy as np
import pytest
import torch
from no_host_sync import pretended_device
from train.shards import larvseg_config, write_squares

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import onto_device
from memseg_dist.config import EngineConfig
from memseg_dist.data.loader import TrainLoader
from memseg_dist.train.engine import TorchEngine
from memseg_dist.train.loop import train_step
from memseg_dist.train.meters import Meter


@pytest.fixture
def copies(monkeypatch):
    """One entry for each copy to the pretended device."""
    seen: list[bool] = []
    check = no_host_sync._check_copy

    def watched(source, target, non_blocking):
        if source.type == "cpu" and target.type == no_host_sync.DEVICE_TYPE:
            seen.append(non_blocking)
        check(source, target, non_blocking)

    monkeypatch.setattr(no_host_sync, "_check_copy", watched)
    return seen


ARRAYS = (
    np.arange(5)[::2], np.eye(3, dtype=bool), np.zeros((0, 2), np.int64), np.array(0.5, np.float32),
    np.arange(6, dtype=np.float64).reshape(2, 3).T,
)  # fmt: skip


def test_arrays_of_all_kinds_go_to_the_device_in_one_copy(copies):
    with pretended_device() as device:
        found = onto_device(device, *ARRAYS)
        assert len(copies) == 1
        for array, tensor in zip(ARRAYS, found, strict=True):
            assert tensor.device == device
            assert torch.equal(tensor.cpu(), torch.from_numpy(array))
    for array, tensor in zip(ARRAYS, onto_device("cpu", *ARRAYS), strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))


def test_a_step_of_larvseg_copies_twice_for_a_weak_slot_and_twice_for_the_commit(copies, tmp_path):
    write_squares(tmp_path / "masks", 20, 2, with_masks=True)
    write_squares(tmp_path / "weak", 20, 4, with_masks=False)
    write_squares(tmp_path / "val", 5, 4, with_masks=True)
    config = larvseg_config(tmp_path, tmp_path / "out")
    config = dataclasses.replace(config, engine=EngineConfig("torch"))
    space = build_label_space(config)
    loader = TrainLoader(config.sources, space, seed=0, cache_dir=config.cache_directory)
    with pretended_device() as device:
        method = build_method(config, space, device).train()
        engine = TorchEngine(method, config, device)
        for step in range(2):  # the first makes constants
            (slots,) = loader.steps(step, step + 1)
            slots = [(batch.to(device), clock) for batch, clock in slots]
            copies.clear()
            train_step(method, engine, slots, 0.01, slots[0][1], Meter())
    num_weak = sum(batch.supervision == "labels" for batch, _ in slots)
    assert num_weak > 0 and len(copies) == 2 * num_weak + 2
