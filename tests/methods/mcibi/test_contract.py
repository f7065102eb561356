"""MCIBI keeps the contract: alone, with all that its code has around it, with a clustered start."""

from __future__ import annotations

import dataclasses

import pytest
from methods.contract import MethodContract

from memseg_dist.methods.mcibi.config import MCIBIConfig, released

SMALL = MCIBIConfig(dim=16, consistency_epochs=0.5, aux_heads=(), stages=(-1,))
LOSSES = {"seg", "distribution", "consistency"}


class TestContract(MethodContract):
    method = SMALL
    losses = {"masks": LOSSES}

    @pytest.mark.parametrize("workers", [2, 3, 4])
    def test_the_same_run_on_any_number_of_workers(self, whole, tmp_path, process_pool, workers):
        super().test_the_same_run_on_any_number_of_workers(whole, tmp_path, process_pool, workers)


class TestReleasedWithPoolingAndAuxiliaryHead(MethodContract):
    method = released(
        dataclasses.replace(SMALL, stages=(-2, -1), aux_heads=(0,), context="ppm", bins=(1, 2))
    )
    losses = {"masks": LOSSES | {"aux"}}


class TestClusteredStart(MethodContract):
    method = dataclasses.replace(SMALL, first_vector="cluster", first_steps=4)
    losses = {"masks": LOSSES}
