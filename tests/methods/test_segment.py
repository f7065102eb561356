"""Plain segmentation against F.cross_entropy of enlarged logits, and a run in which it learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods.contract import MethodContract
from methods.patches import Patches
from torch import nn
from train.shards import larvseg_config, write_squares
from train.test_loop import Here

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.config import EngineConfig, OptimizerConfig, from_json, to_json
from memseg_dist.methods.segment import Segment, SegmentConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.nn.deeplab import DeepLabV2Head
from memseg_dist.train import loop
from memseg_dist.train.engine import TorchEngine
from memseg_dist.train.platform import Tracker

NUM_CLASSES, DIM, SIZE, GRID = 7, 6, 24, 6
IDS = np.array([1, 3, 4, 6])
HEADS = [SegmentConfig(rates=(1, 2)), SegmentConfig(head="linear")]


def build(config: SegmentConfig) -> Segment:
    torch.manual_seed(0)
    method = Segment(
        Patches(DIM, SIZE // GRID), config, num_classes=NUM_CLASSES, classes={"masks": IDS}
    )
    with torch.no_grad():
        for parameter in method.head.parameters():
            parameter.normal_()
    return method


def batch(masks: torch.Tensor | None, source: str = "masks") -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    supervision = "labels" if masks is None else "masks"
    valid = torch.ones(2, SIZE, SIZE, dtype=torch.bool)
    return Batch(images, valid, masks, ((), ()), source, supervision, ("a", "b"))


def random_masks() -> torch.Tensor:
    masks = torch.from_numpy(IDS)[torch.randint(0, len(IDS), (2, SIZE, SIZE))]
    return masks.masked_fill(torch.rand(masks.shape) < 0.3, IGNORE)


@pytest.mark.parametrize("config", HEADS)
@pytest.mark.parametrize("denominator", ["valid", "all"])
def test_loss_and_gradients_equal_the_cross_entropy_of_enlarged_logits(config, denominator):
    method = build(dataclasses.replace(config, seg_denominator=denominator))
    masks = random_masks()
    masks[0, 0] = 2  # a class that the source does not have: as good as unknown
    got = method(batch(masks), Clock(0))["seg"]

    (features,) = method.backbone(batch(masks).images)
    low = method._logits(features, torch.from_numpy(IDS)).dense()
    logits = F.interpolate(low, (SIZE, SIZE), mode="bilinear", align_corners=False)
    target = torch.full_like(masks, IGNORE)
    for column, class_id in enumerate(IDS.tolist()):
        target[masks == class_id] = column
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    known = int((target != IGNORE).sum())
    expected = total / (known if denominator == "valid" else target.numel())
    torch.testing.assert_close(got, expected)
    parameters = list(method.parameters())
    for one, other in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", HEADS)
@pytest.mark.parametrize("denominator", ["valid", "all"])
def test_a_crop_of_any_size_is_one_that_was_padded(config, denominator):
    """Of 21 pixels: 6 whole positions of 4, as evaluation enlarges them."""
    method = build(dataclasses.replace(config, seg_denominator=denominator))
    item = batch(random_masks())
    item.images[..., 21:, :] = item.images[..., 21:] = 0
    item.masks[:, 21:] = item.masks[..., 21:] = IGNORE
    cut = dataclasses.replace(
        item,
        images=item.images[..., :21, :21],
        valid=item.valid[..., :21, :21],
        masks=item.masks[..., :21, :21],
    )
    padded, found = (method(one, Clock(0))["seg"] for one in (item, cut))
    expected = padded if denominator == "valid" else padded * SIZE**2 / 21**2
    torch.testing.assert_close(found, expected)


def test_by_default_the_labelled_pixels_are_divided_by():
    masks = random_masks()
    default, valid, every = (
        build(dataclasses.replace(HEADS[1], **change))(batch(masks), Clock(0))["seg"]
        for change in ({}, {"seg_denominator": "valid"}, {"seg_denominator": "all"})
    )
    assert torch.equal(default, valid) and not torch.isclose(default, every)


def test_deeplab_head_is_the_sum_of_dilated_convolutions():
    torch.manual_seed(0)
    head = DeepLabV2Head(DIM, NUM_CLASSES, (1, 3))
    features, ids = torch.randn(2, DIM, 9, 8), torch.tensor([5, 0])
    expected = torch.zeros(2, NUM_CLASSES, 9, 8)
    for rate, weight in zip((1, 3), head.weight):
        convolution = nn.Conv2d(DIM, NUM_CLASSES, 3, padding=rate, dilation=rate)
        convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(head.bias / 2)
        expected = expected + convolution(features)
    torch.testing.assert_close(head(features, ids), expected[:, ids])
    with pytest.raises(ValueError, match=r"rates of the head are \(\)"):
        DeepLabV2Head(DIM, NUM_CLASSES, ())


@pytest.mark.parametrize("config", HEADS)
def test_prediction_of_some_classes_is_a_part_of_that_of_all(config):
    method, images = build(config), batch(None).images
    every = method.predict(images, torch.arange(NUM_CLASSES)).dense()
    assert every.shape == (2, NUM_CLASSES, GRID, GRID) and not every.requires_grad
    some = method.predict(images, torch.tensor([5, 2]))
    torch.testing.assert_close(some.dense(), every[:, [5, 2]])
    torch.testing.assert_close(some.chunk(1, 2), every[:, [2]])
    norm = method.embed(images).norm(dim=1)
    torch.testing.assert_close(norm, torch.ones_like(norm))
    assert method.maps(images, [0, 1]) == {} and method.charts() == {} and method.state() == {}


@pytest.mark.parametrize("config", HEADS)
def test_nothing_labelled_costs_nothing(config):
    method = build(config)
    loss = method(batch(torch.full((2, SIZE, SIZE), IGNORE)), Clock(0))["seg"]
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in method.parameters())


def test_a_source_without_masks_is_refused_before_the_first_step(tmp_path):
    write_squares(tmp_path / "weak", 8, 4, with_masks=False)
    whole = larvseg_config(tmp_path, tmp_path / "out")
    config = dataclasses.replace(
        whole, sources=whole.sources[1:], validation=None, method=SegmentConfig()
    )
    with pytest.raises(ValueError, match=r"source 'weak' has supervision 'labels'.*use 'masks'"):
        build_method(config, build_label_space(config))
    build_method(config, build_label_space(config), for_training=False)


def test_a_source_of_another_name_is_named():
    method = build(HEADS[0])
    with pytest.raises(ValueError, match=r"source 'other' is not one of \['masks'\]"):
        method(batch(random_masks(), "other"), Clock(0))


@pytest.mark.parametrize("head", ["deeplabv2", "linear"])
def test_a_run_learns(tmp_path, head):
    write_squares(tmp_path / "masks", 16, 2, with_masks=True)
    whole = larvseg_config(tmp_path, tmp_path / "out")
    config = dataclasses.replace(
        whole,
        sources=whole.sources[:1],
        validation=None,
        method=SegmentConfig(head=head, rates=(1, 2)),
        optimizer=OptimizerConfig(kind="adamw", lr=0.01, clip_norm=1.0),
        engine=EngineConfig("torch"),
        steps=12,
    )
    assert from_json(to_json(config)) == config
    loop.train(config, Here(), Tracker(), TorchEngine)
    lines = Path(config.directory, "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/masks/seg"] for line in lines]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.5 * losses[0]


class TestContract(MethodContract):
    method = SegmentConfig(rates=(1, 2))
    losses = {"masks": {"seg"}}


class TestContractWithBatchNorm(TestContract):
    """And channels_last, as on CUDA."""

    changes = {
        "backbone": BackboneConfig("test_resnet", output_stride=8, drop_path=0.0),
        "engine": EngineConfig("torch", channels_last=True),
    }
