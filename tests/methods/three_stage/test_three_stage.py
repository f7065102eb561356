"""What reaches which block of Three-stage; its weights, flags, teacher and use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.three_stage.small import (
    CONFIG,
    IDS,
    NUM_CLASSES,
    SOURCES,
    TwoBlocks,
    batch,
    build,
    clock,
)
from torch import nn

from memseg_dist.batch import IGNORE, Clock
from memseg_dist.methods.three_stage.method import ThreeStage, image_shares
from memseg_dist.methods.three_stage.teacher import averaged, decay_at
from memseg_dist.nn.backbone import BackboneConfig, build_backbone
from memseg_dist.nn.batchnorm import recording


def test_the_decay_has_a_schedule():
    decays = [decay_at(Clock(step, num_steps=60), CONFIG) for step in range(60)]
    assert decays == 20 * [0.99] + 20 * [0.995] + 10 * [0.9975] + 10 * [0.999]
    constant = replace(CONFIG, decays=(0.5,), decay_until=())
    assert decay_at(Clock(59, num_steps=60), constant) == 0.5
    assert decay_at(Clock(3), CONFIG) == 0.99  # a run of unknown length


def test_slots_weigh_by_their_images():
    assert image_shares(SOURCES) == {"few": 2 / 8, "many": 3 / 8}
    assert image_shares(SOURCES[:1]) == {"few": 1.0}


# ---------------------------------------------------------------- which losses reach which block


def gradients(method: ThreeStage, name: str, slot: int) -> set[str]:
    method.zero_grad()
    method(batch(0, slot), clock(0, slot))[name].backward()
    parts = {
        "conv4": method.backbone.conv4, "conv5": method.backbone.conv5, "head": method.head,
        "branch": method.branch,
    }  # fmt: skip
    return {
        part
        for part, module in parts.items()
        if any(p.grad is not None and p.grad.any() for p in module.parameters())
    }


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize(("stage", "shared"), [(2, {"conv4"}), (3, {"conv4", "conv5"})])
def test_the_branch_shares_blocks_and_trains_them(stage, shared, slot):
    method = build(replace(CONFIG, stage=stage)).train()
    assert gradients(method, "pseudo", slot) == shared | {"branch"}
    assert gradients(method, "consistency", slot) == {"conv4", "conv5", "head"}
    if slot == 0:
        assert gradients(method, "seg", slot) == {"conv4", "conv5", "head"}


def test_task_1_never_sees_a_pseudo_mask():
    method, item = build().train(), batch(0, 0)
    blind = replace(item, pseudo_masks=torch.full_like(item.pseudo_masks, IGNORE))
    one, other = method(item, clock(0)), method(blind, clock(0))
    assert torch.equal(one["seg"], other["seg"])
    assert torch.equal(one["consistency"], other["consistency"])
    assert one["pseudo"] > 0 and other["pseudo"] == 0


@pytest.mark.parametrize(("stage", "dilated"), [(2, True), (2, False), (3, True)])
def test_branches_on_a_resnet(stage, dilated):
    """The sizes of the paper: three bottlenecks of half conv5's width, dilated as it is."""
    config = BackboneConfig("test_resnet", output_stride=8 if dilated else None, drop_path=0.0)
    backbone = build_backbone(config, (-2, -1))
    method = ThreeStage(
        backbone, replace(CONFIG, stage=stage, branch_dilation=None), sources=SOURCES,
        class_ids=IDS, num_classes=NUM_CLASSES,
    )  # fmt: skip
    assert method.branch is not None
    images = torch.randint(0, 256, (2, 3, 70, 90), dtype=torch.uint8)
    maps, ids = backbone(images), torch.from_numpy(IDS)
    assert method.branch(maps, ids).shape == method.head(maps[-1], ids).shape
    if stage == 3:
        assert method.branch.own is None
        return
    convolutions = [m for m in method.branch.own.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 10
    assert convolutions[1].dilation == ((4, 4) if dilated else (1, 1))
    assert convolutions[-1].out_channels == backbone.dim // 2
    assert convolutions[1].in_channels == backbone.dim // 8


# ---------------------------------------------------------------- flags, the teacher, use


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"consistency_weight": 0.0}, {"seg", "pseudo"}),
        ({"pseudo_weight": 0.0}, {"seg", "consistency"}),
        ({"pseudo_weight": 0.0, "consistency_weight": 0.0}, {"seg"}),
    ],
)
def test_a_loss_of_weight_0_is_not_there(change, names):
    method = build(replace(CONFIG, **change)).train()
    assert set(method(batch(0, 0), clock(0))) == names
    assert set(method(batch(0, 1), clock(0, 1))) == names - {"seg"}
    assert (method.branch is None) == ("pseudo" not in names)
    without = replace(batch(0, 0), pseudo_masks=None)
    if method.branch is None:
        method(without, clock(0))


def test_the_teacher_is_out_of_sight():
    """No parameter, no buffer, no module of the method; it starts as the student."""
    method = build().train()
    assert method.teacher is not None
    mine = {id(t) for t in averaged(method.teacher).values()}
    assert not mine & {id(t) for t in [*method.parameters(), *method.buffers()]}
    assert not any("teacher" in name for name in method.state_dict())
    assert not any(t.requires_grad for t in averaged(method.teacher).values())
    fresh = ThreeStage(TwoBlocks(), CONFIG, sources=SOURCES, class_ids=IDS, num_classes=NUM_CLASSES)
    for name, tensor in averaged(fresh).items():
        assert torch.equal(averaged(fresh.teacher)[name], tensor), name
    assert not method.teacher.backbone.training and method.backbone.training


def test_the_state_goes_round():
    method, other = build(), build()
    with torch.no_grad():
        for tensor in averaged(method.teacher).values():
            tensor.add_(0.25)
    saved = {
        name: tensor.clone() for name, tensor in method.state()["teacher"].state_dict().items()
    }
    other.state()["teacher"].load_state_dict(lambda name, start=0, stop=None: saved[name])
    for name, tensor in averaged(other.teacher).items():
        assert torch.equal(tensor, averaged(method.teacher)[name]), name


def test_prediction_with_either_network():
    images, ids = batch(0, 1).images, torch.tensor([5, 0])
    method = build().eval()
    with torch.no_grad():
        method.teacher.head.bias.add_(1.0)
    taught = method.predict(images, ids).dense()
    method.config = replace(CONFIG, predict_with="student")
    torch.testing.assert_close(taught - 1, method.predict(images, ids).dense())
    alone = build(replace(CONFIG, predict_with="student"), with_teacher=False).eval()
    assert alone.state() == {} and set(alone.maps(images, [0, 1, 5])) == {"student", "branch"}
    itself = build(replace(CONFIG, teacher="student"))
    assert itself.state() == {} and itself.summary(clock(0)) == {}
    itself.after_step(clock(0))


def test_maps_are_probabilities_of_the_class():
    method, images = build().eval(), batch(0, 1).images
    maps = method.maps(images, [5, 0, 1])
    assert set(maps) == {"student", "teacher", "branch"}
    wanted = method.head(method.backbone(images)[-1], torch.from_numpy(IDS)).softmax(dim=1)
    torch.testing.assert_close(maps["student"][0], wanted[0, 3])
    assert not maps["student"][2].any()  # class 1 is none of the labelled sources'
    assert all(map.min() >= 0 and map.max() <= 1 for map in maps.values())


def test_its_own_teacher_moves_no_statistics():
    method = build(replace(CONFIG, teacher="student", pseudo_weight=0.0)).train()
    with recording(method, 1):
        method(batch(0, 1), clock(0, 1))
    layer = method.backbone.conv4[1]
    assert len(layer.slot_statistics.seen[1]) == 1 and layer.training


def test_a_source_of_another_name_is_named():
    with pytest.raises(ValueError, match=r"source 'other' is not one of \['few', 'many'\]"):
        build()(replace(batch(0, 0), source="other"), clock(0))
