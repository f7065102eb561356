"""Three-stage keeps the contract in both stages, and with every flag that changes the step."""

from __future__ import annotations

import dataclasses

import methods.three_stage.stand_in  # noqa: F401
from methods.contract import MethodContract
from methods.contract import run as run_contract
from train import test_loop
from train.test_loop import assert_same_checkpoints, losses, run_until_killed

from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.nn.backbone import BackboneConfig

SMALL = ThreeStageConfig(rates=(1, 2))
LOSSES = {"masks": {"seg", "consistency", "pseudo"}, "weak": {"consistency", "pseudo"}}


def run(config_json, stop_at=None):
    """In a worker, which knows the pseudo masks because this module is imported."""
    return run_contract(config_json, stop_at)


class Contract(MethodContract):
    method = SMALL
    losses = LOSSES
    run = staticmethod(run)

    def config(self, data, storage, **changes):
        """The second source without its labels; its classes n2 and n3 have no mask anywhere."""
        config = super().config(data, storage, **changes)
        few, many = (
            dataclasses.replace(source, pseudo_masks=source.path) for source in config.sources
        )
        assert config.validation is not None
        return dataclasses.replace(
            config,
            sources=(few, dataclasses.replace(many, supervision="none")),
            validation=dataclasses.replace(config.validation, exclude=("n2", "n3")),
        )


class TestStage2(Contract):
    def test_killed_and_resumed_it_is_the_same_run(self, data, tmp_path, monkeypatch):
        """By SIGKILL, under DeepSpeed: losses, weights and teacher, bit for bit."""
        imports = "from train.test_loop import Here\nimport methods.three_stage.stand_in"
        program = test_loop.KILLED.replace("from train.test_loop import Here", imports)
        monkeypatch.setattr(test_loop, "KILLED", program)
        whole, killed = (self.config(data, tmp_path / name) for name in ("whole", "killed"))
        run_until_killed(whole, 0)
        run_until_killed(killed, 5, 0)
        assert losses(killed) == losses(whole)
        assert_same_checkpoints(killed, whole)


class TestStage3(Contract):
    method = dataclasses.replace(SMALL, stage=3)
    changes = {"backbone": BackboneConfig("test_resnet", output_stride=8, drop_path=0.0)}


class TestStage2WithFrozenBatchNorm(Contract):
    """The branch's own BatchNorm is trained."""

    changes = {
        "backbone": BackboneConfig(
            "test_resnet", output_stride=8, drop_path=0.0, frozen_batchnorm=True
        )
    }


class TestItsOwnTeacherSoftTargets(Contract):
    method = dataclasses.replace(SMALL, teacher="student", target="soft", keep_cutout_pixels=False)
