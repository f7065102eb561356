"""MCIBI keeps the contract: alone, with all that its code has around it, with a clustered start."""

from __future__ import annotations

import dataclasses

import pytest
from methods.contract import MethodContract
from train.test_loop import assert_same_checkpoints, losses, run_until_killed

from memseg_dist.methods.mcibi.config import MCIBIConfig, released

SMALL = MCIBIConfig(dim=16, consistency_epochs=0.5, aux_heads=(), stages=(-1,))
LOSSES = {"seg", "distribution", "consistency"}


class TestContract(MethodContract):
    method = SMALL
    losses = {"masks": LOSSES}

    @pytest.mark.parametrize("workers", [2, 3, 4])
    def test_the_same_run_on_any_number_of_workers(self, whole, tmp_path, process_pool, workers):
        super().test_the_same_run_on_any_number_of_workers(whole, tmp_path, process_pool, workers)

    @pytest.mark.slow
    def test_killed_and_resumed_it_is_the_same_run(self, data, tmp_path):
        """By SIGKILL, under DeepSpeed: losses, weights and memory, bit for bit."""
        whole, killed = (self.config(data, tmp_path / name) for name in ("whole", "killed"))
        run_until_killed(whole, 0)
        run_until_killed(killed, 5, 0)
        assert losses(killed) == losses(whole)
        assert_same_checkpoints(killed, whole)


class TestReleasedWithPoolingAndAuxiliaryHead(MethodContract):
    method = released(
        dataclasses.replace(SMALL, stages=(-2, -1), aux_heads=(0,), context="ppm", bins=(1, 2))
    )
    losses = {"masks": LOSSES | {"aux"}}


class TestClusteredStart(MethodContract):
    method = dataclasses.replace(SMALL, first_vector="cluster", first_steps=4)
    losses = {"masks": LOSSES}
