"""Three-stage keeps the contract in both stages, and with every flag that changes the step."""

from __future__ import annotations

import dataclasses

from methods.contract import MethodContract, StepContract

from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.nn.backbone import BackboneConfig

SMALL = ThreeStageConfig(rates=(1, 2))
LOSSES = {"masks": {"seg", "consistency", "pseudo"}, "unlabelled": {"consistency", "pseudo"}}


class PseudoMasks(StepContract):
    method = SMALL
    losses = LOSSES

    def config(self, data, storage, **changes):
        """Masks of the same images stand for the labels of the stage before."""
        config = super().config(data, storage, **changes)
        labels = str(data / "masks")
        sources = (dataclasses.replace(s, pseudo_masks=labels) for s in config.sources)
        return dataclasses.replace(config, sources=tuple(sources))


class TestStage2(PseudoMasks, MethodContract):
    pass


class TestStage3(PseudoMasks, MethodContract):
    method = dataclasses.replace(SMALL, stage=3)
    changes = {"backbone": BackboneConfig("test_resnet", output_stride=8, drop_path=0.0)}


class TestStage2WithFrozenBatchNorm(PseudoMasks):
    """The branch's own BatchNorm is trained."""

    changes = {
        "backbone": BackboneConfig(
            "test_resnet", output_stride=8, drop_path=0.0, frozen_batchnorm=True
        )
    }


class TestItsOwnTeacherSoftTargets(PseudoMasks):
    method = dataclasses.replace(SMALL, teacher="student", target="soft", keep_cutout_pixels=False)
