"""PseudoSeg keeps the contract: with unlabelled images, with image labels, and supervised."""

from __future__ import annotations

import dataclasses

from methods.contract import MethodContract, StepContract

from memseg_dist.methods.pseudoseg.config import PseudoSegConfig, released
from memseg_dist.nn.backbone import BackboneConfig

SMALL = PseudoSegConfig(dim=8, attention_dim=4, stages=(1, -2, -1), rates=(1, 2), warmup=0.2)
CONVOLUTIONS = {"backbone": BackboneConfig("test_resnet", drop_path=0.0, output_stride=16)}
"""BatchNorm in the backbone: several forward passes of a slot move its statistics."""


class TestContract(MethodContract):
    method = SMALL
    changes = CONVOLUTIONS
    losses = {"masks": {"seg", "classification", "activation"}, "unlabelled": {"unlabelled"}}


class TestImageLabels(MethodContract):
    method = SMALL
    changes = CONVOLUTIONS
    losses = {
        "masks": {"seg", "classification", "activation"},
        "weak": {"unlabelled", "classification"},
    }
    teach_classes = {"masks"}


class TestReleasedWithHardLabels(StepContract):
    method = dataclasses.replace(released(SMALL), hard=True, threshold=0.5, norm_scope="image")
    changes = CONVOLUTIONS
    losses = {"masks": {"seg", "classification", "activation"}, "unlabelled": {"unlabelled"}}


class TestSupervised(StepContract):
    method = dataclasses.replace(SMALL, pseudo_label="none")
    changes = CONVOLUTIONS
    losses = {"masks": {"seg"}}
