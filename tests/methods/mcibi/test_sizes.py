"""Pictures that are no whole positions of the backbone, and maps finer than its deepest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.methods.mcibi.method import MCIBI
from memseg_dist.nn.backbone import BackboneConfig, build_backbone

RESNET = BackboneConfig("resnet10t", output_stride=8, drop_path=0.0)
HRNET = BackboneConfig(
    "hrnet_w18_small", drop_path=0.0, options={"feature_location": '""'}
)  # fmt: skip
CONFIG = MCIBIConfig(dim=16, dropout=0.0, stages=(-2, -1), aux_heads=(), consistency_weight=0.0)
ALL = {"pixels": "all", "stages": (-4, -3, -2, -1)}
NUM_CLASSES = 4


def method(backbone: BackboneConfig, **changes) -> MCIBI:
    torch.manual_seed(0)
    config = replace(CONFIG, **changes)
    ids = {"masks": np.arange(NUM_CLASSES)}
    net = build_backbone(backbone, config.stages)
    return MCIBI(net, config, classes=ids, num_classes=NUM_CLASSES, epoch_steps=10)


def batch(size: tuple[int, int], filled: tuple[int, int]) -> Batch:
    """Two images of `size`, filled up below and to the right as the loader pads crops."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    masks = torch.randint(0, NUM_CLASSES, (2, *size), generator=generator)
    border = (0, filled[1] - size[1], 0, filled[0] - size[0])
    return Batch(
        images=F.pad(pixels, border),
        valid=F.pad(torch.ones(2, *size, dtype=torch.bool), border),
        masks=F.pad(masks, border, value=IGNORE),
        labels=((), ()),
        source="masks",
        supervision="masks",
        keys=("one", "two"),
    )


@pytest.mark.parametrize(
    ("backbone", "changes", "filled"),
    [(RESNET, {}, (40, 64)), (HRNET, ALL, (64, 64)), (RESNET, {"context": "uper"}, (40, 64))],
    ids=["resnet", "hrnet", "uper"],
)
def test_a_crop_of_any_size_is_one_that_was_padded(backbone, changes, filled):
    """Losses and what the memory takes in; the padding counts for nothing."""
    found = []
    clock = Clock(0, num_steps=10)
    for size in ((37, 58), filled):
        model = method(backbone, **changes).train()
        losses = model(batch((37, 58), size), clock)
        model.after_step(clock)
        assert model.memory is not None
        found.append({**losses, "memory": model.memory.rows.rows.clone()})
    for name, value in found[0].items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(value, found[1][name], msg=name)


@pytest.mark.parametrize(
    ("backbone", "changes", "stride"),
    [
        (RESNET, {}, 8),
        (HRNET, ALL, 4),
        (HRNET, ALL | {"downsample": True}, 8),
        (RESNET, {"context": "uper", "stages": (-4, -1), "bins": (1,)}, 4),
    ],
    ids=["resnet", "hrnet", "halved", "uper"],
)
def test_a_predictions_positions_end_with_the_picture(backbone, changes, stride):
    """Else enlarging them would squeeze the picture: 683 pixels are 171 positions of 4, not the 176
    of a backbone that fills up to whole positions of 32.
    """
    model = method(backbone, **changes).eval()
    assert model.stride == stride
    for height, width in ((64, 96), (75, 110), (93, 125)):
        images = batch((height, width), (height, width)).images
        logits = model.predict(images, torch.arange(NUM_CLASSES)).dense()
        size = -(-height // stride), -(-width // stride)
        assert logits.shape == (2, NUM_CLASSES, *size)
        whole = model.net(model.backbone(images)).logits.detach()
        torch.testing.assert_close(logits, whole[..., : size[0], : size[1]])
        assert model.embed(images).shape[-2:] == size
        assert {part.shape[-2:] for part in model.maps(images, [0, 1]).values()} == {size}
