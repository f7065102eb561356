"""A network of two blocks, and batches of two sources."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.data.source import Source
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.methods.three_stage.method import ThreeStage
from memseg_dist.nn.backbone import FeatureStage
from memseg_dist.nn.batchnorm import record_batchnorm

HEIGHT, WIDTH = SIZE = (11, 14)
STRIDE, NUM_CLASSES, NUM_STEPS = 4, 6, 6
IDS = np.array([0, 2, 3, 5])
SOURCES = (
    Source("few", "few", "masks", slots=1, batch_per_slot=2, pseudo_masks="y"),
    Source("many", "many", "none", slots=2, batch_per_slot=3, pseudo_masks="y"),
)
CONFIG = ThreeStageConfig(rates=(1, 2), cutout_share=0.3, branch_dilation=1)


class TwoBlocks(nn.Module):
    """Two stages with BatchNorm; the second has twice the stride of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = (FeatureStage(6, 2), FeatureStage(16, STRIDE))
        self.dim, self.stride = 16, STRIDE
        mean = torch.tensor([120.0, 110.0, 100.0]).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.conv4 = nn.Sequential(nn.Conv2d(3, 6, 3, 2, padding=1), nn.BatchNorm2d(6))
        self.conv5 = nn.Sequential(nn.Conv2d(6, 16, 3, 2, padding=1), nn.BatchNorm2d(16))
        record_batchnorm(self)

    def forward(self, images, valid=None):
        pixels = ((images - self.mean) / 60).to(self.conv4[0].weight.dtype)
        if valid is not None:
            pixels = pixels * valid[:, None]
        height, width = images.shape[-2:]
        low = self.conv4(F.pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE)))
        return low, self.conv5(low.relu())

    def set_activation_checkpointing(self, enabled: bool) -> None:
        assert not enabled


def build(config: ThreeStageConfig = CONFIG, **keywords) -> ThreeStage:
    torch.manual_seed(0)
    method = ThreeStage(
        TwoBlocks().double(), config, sources=SOURCES, class_ids=IDS, num_classes=NUM_CLASSES,
        **keywords,
    ).double()  # fmt: skip
    with torch.no_grad():
        for head in [method.head] + ([] if method.branch is None else [method.branch.head]):
            head.weight.normal_(std=0.1)
            head.bias.normal_()
    if method.teacher is not None:
        method.teacher.head = copy.deepcopy(method.head).requires_grad_(False)
    return method


def batch(step: int, slot: int) -> Batch:
    source = SOURCES[slot > 0]
    generator = torch.Generator().manual_seed(10 * step + slot)
    shape = (source.batch_per_slot, *SIZE)
    images = torch.randint(0, 256, (shape[0], 3, *SIZE), generator=generator, dtype=torch.uint8)
    valid = torch.ones(shape, dtype=torch.bool)
    valid[0, -2:] = False  # padding
    if (step, slot) == (1, 0):
        valid[:] = False  # samples that could not be read
    masks, pseudo = (
        torch.randint(-1, NUM_CLASSES, shape, generator=generator).masked_fill(~valid, IGNORE)
        for _ in range(2)
    )
    return Batch(
        images.mul(valid[:, None]), valid, masks if slot == 0 else None, ((),) * shape[0],
        source.name, source.supervision, tuple("abc"[: shape[0]]), pseudo_masks=pseudo,
    )  # fmt: skip


def clock(step: int, slot: int = 0) -> Clock:
    return Clock(step, slot, num_slots=3, seed=7, num_steps=NUM_STEPS)
