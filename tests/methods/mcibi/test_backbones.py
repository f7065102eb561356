"""MCIBI on real nets: the families of the paper, and every input that a run must refuse."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from train.shards import larvseg_config, write_squares

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import Batch, Clock
from memseg_dist.config import EngineConfig, RunConfig
from memseg_dist.data.loader import Source
from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.methods.mcibi.method import MCIBI
from memseg_dist.nn.backbone import BackboneConfig, build_backbone

SMALL = MCIBIConfig(dim=8, bins=(1, 2), rates=(1, 2))
HRNET = {"feature_location": '""'}  # the branches themselves
RAW = {"pixels": "all", "aux_heads": ()}
VIT = {"stages": (2, 5, 8, 11), "aux_heads": (1,)}
FAMILIES = {
    "resnet": (BackboneConfig("resnet18", output_stride=8, drop_path=0.0), {}, 8),
    "resnest": (BackboneConfig("resnest14d", output_stride=8, drop_path=0.0), {}, 8),
    "hrnet": (BackboneConfig("hrnet_w18_small", drop_path=0.0, options=HRNET), RAW, 4),
    "vit": (BackboneConfig("vit_tiny_patch16_224", image_size=64), VIT, 16),
    "swin": (BackboneConfig("swin_tiny_patch4_window7_224", image_size=64), {}, 32),
    "convnext": (BackboneConfig("convnext_atto", output_stride=8), {}, 8),
}
PAPER = {
    "resnet50": (BackboneConfig("resnet50c", output_stride=8, drop_path=0.0), {}, 8),
    "resnet101": (BackboneConfig("resnet101c", output_stride=8, drop_path=0.0), {}, 8),
    "resnest101": (BackboneConfig("resnest101e", output_stride=8, drop_path=0.0), {}, 8),
    "hrnet_w48": (BackboneConfig("hrnet_w48", drop_path=0.0, options=HRNET), RAW, 4),
    "vit_large": (
        BackboneConfig("vit_large_patch16_384", image_size=64),
        {"stages": (9, 14, 19, 23), "aux_heads": (0, 1, 2)},
        16,
    ),
}


def train_and_predict(backbone: BackboneConfig, stride: int, **changes) -> MCIBI:
    config = replace(SMALL, **changes)
    method = MCIBI(
        build_backbone(backbone, config.stages), config, classes={"masks": np.arange(3)},
        num_classes=3, epoch_steps=1,
    )  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    valid, masks = torch.ones(2, 64, 64, dtype=torch.bool), torch.randint(-1, 3, (2, 64, 64))
    item = Batch(images, valid, masks, ((), ()), "masks", "masks", ("a", "b"))
    for step in (1, 2):
        losses = method(item, Clock(step, num_steps=4))
        sum(losses.values()).backward()
        method.after_step(Clock(step, num_steps=4))
    assert all(torch.isfinite(loss) for loss in losses.values())
    method.eval()
    dense = method.predict(images, torch.arange(3)).dense()
    assert dense.shape == (2, 3, 64 // stride, 64 // stride)
    return method


@pytest.mark.parametrize(
    ("family", "context"),
    [
        *((family, "none") for family in FAMILIES),
        ("resnet", "ppm"),
        ("convnext", "aspp"),
        ("hrnet", "ocr"),
        ("swin", "uper"),
        ("vit", "uper"),
    ],
)
def test_families_and_contexts(family, context):
    """UPerNet's map has the size of the first stage's."""
    backbone, changes, stride = FAMILIES[family]
    if family == "hrnet":
        changes = changes | {"aux_heads": (-1,)}
    if (family, context) == ("swin", "uper"):
        stride = 4
    train_and_predict(backbone, stride, context=context, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_backbones(name):
    backbone, changes, stride = PAPER[name]
    method = train_and_predict(backbone, stride, context="aspp", **changes)
    if name == "hrnet_w48":
        assert [stage.dim for stage in method.backbone.stages] == [48, 96, 192, 384]


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("squares")
    write_squares(root / "masks", 6, 2, with_masks=True)
    write_squares(root / "val", 3, 4, with_masks=True)
    return root


def run_config(data, **changes) -> RunConfig:
    base = larvseg_config(data, data / "runs")
    source = Source("masks", str(data / "masks"), "masks", augment=base.sources[0].augment)
    assert base.validation is not None
    defaults = {
        "sources": (source,),
        "method": replace(SMALL, stages=(-1,), aux_heads=(0,), consistency_epochs=0.0),
        "validation": replace(base.validation, base=(), novel=(), exclude=("n2", "n3")),
        "engine": EngineConfig("torch"),
    }
    return dataclasses.replace(base, **(defaults | changes))


def refused(config: RunConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_method(config, build_label_space(config))


def test_a_source_without_masks(data):
    config = run_config(data)
    source = replace(config.sources[0], supervision="labels")
    refused(replace(config, sources=(source,)), "'masks' has supervision 'labels'.*masks alone")


def test_a_class_that_no_mask_shows(data, tmp_path):
    write_squares(tmp_path / "masks", 1, 4, with_masks=True)  # one image, of two classes
    shown = np.random.default_rng(0).permutation(4)[:2]
    unseen = tuple(f"n{k}" for k in range(4) if k not in shown)
    config = run_config(data)
    assert config.validation is not None
    source = replace(config.sources[0], path=str(tmp_path / "masks"))
    every = replace(config, sources=(source,), validation=replace(config.validation, exclude=()))
    refused(every, rf"\['{unseen[0]}', '{unseen[1]}'\] are in no mask.*--sources.0.exclude")
    without = replace(
        config,
        sources=(replace(source, exclude=unseen),),
        validation=replace(config.validation, exclude=unseen),
    )
    build_method(without, build_label_space(without))


def test_a_scored_class_that_no_source_has(data):
    config = run_config(data)
    assert config.validation is not None
    every = replace(config, validation=replace(config.validation, exclude=()))
    refused(every, r"\['n2', 'n3'\], which no source has masks of.*--validation.exclude")


def test_one_image_per_slot_under_a_pooled_branch(data):
    config = run_config(data)
    alone = (replace(config.sources[0], batch_per_slot=1),)
    for context in ("ppm", "aspp", "uper"):
        method = replace(config.method, context=context, stages=(-2, -1))
        refused(replace(config, sources=alone, method=method), "batch_per_slot 1.*use 2 or more")
    build_method(replace(config, sources=alone), build_label_space(config))


def test_consistent_learning_that_would_never_begin(data):
    """Of 6 steps, where an epoch takes 3."""
    config = run_config(data)
    late = replace(config.method, consistency_epochs=2.0)
    refused(replace(config, method=late), r"steps is 6, but method.consistency_epochs 2.0 are 6")
    off = replace(late, consistency_weight=0.0)
    build_method(replace(config, method=off), build_label_space(config))


def test_a_stage_that_the_backbone_lacks(data):
    config = run_config(data)
    method = replace(config.method, stages=(1, 99))
    refused(replace(config, method=method), r"stages \(1, 99\) of backbone 'vit_tiny")


def test_a_head_that_needs_more_stages(data):
    config = run_config(data)
    method = replace(config.method, context="uper")
    refused(replace(config, method=method), "give method.stages two or more")
