"""Three-stage's whole steps against nested loops: losses, gradients, teacher; its use."""

from __future__ import annotations

import copy
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import three_stage as reference
from torch import nn

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.data.source import Source
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.methods.three_stage.method import ThreeStage, image_shares
from memseg_dist.methods.three_stage.strong import draw, draw_operators
from memseg_dist.methods.three_stage.teacher import averaged, decay_at
from memseg_dist.nn.backbone import BackboneConfig, FeatureStage, build_backbone
from memseg_dist.nn.batchnorm import commit_statistics, record_batchnorm, recording

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


class ByLoops:
    """Eq. 1 - 5 of a step with the layers of `method`: (sum over slots of a slot's loss) / S."""

    def __init__(self, method: ThreeStage) -> None:
        self.method, self.config = method, method.config
        self.teacher = copy.deepcopy((method.backbone, method.head))

    def step(self, step: int) -> dict[str, torch.Tensor]:
        losses = {name: torch.zeros((), dtype=torch.float64) for name in ("seg", "con", "pl")}
        for slot in range(3):
            for name, loss in self.slot(batch(step, slot), clock(step, slot)).items():
                # the mean over images: 2 labelled ones, 8 of all
                of_all = 2 if name == "seg" else 8
                losses[name] = losses[name] + loss * len(batch(step, slot).keys) / of_all
        return losses

    def slot(self, item: Batch, now: Clock) -> dict[str, torch.Tensor]:
        config, method = self.config, self.method
        images, count = item.images, len(item.keys)
        matrices, cut, frame = [np.eye(3)] * count, torch.zeros_like(item.valid), item.valid
        if config.strong and item.masks is None:
            seed = now.seed_for("strong augmentation")
            random = Random(seed)
            matrices = [draw(config, random, *SIZE).matrix for _ in range(count)]
            operators = draw_operators(config, Random(seed), item.valid)
            images, cut = (
                operators.images(images, item.valid, method.backbone.mean),
                (operators.cut_out()),
            )
            frame = self.warped(item.valid.long(), matrices, 0).bool()
        counts = frame if config.keep_cutout_pixels else frame & ~cut
        maps = method.backbone(images, frame & ~cut)
        logits = self.enlarged(method.head(maps[1], torch.from_numpy(IDS)))
        found = {}
        if item.masks is not None:
            found["seg"] = reference.mean_cross_entropy(logits, self.columns(item.masks))
        con = [self.masked(one, known) for one, known in zip(self.taught(item, matrices), counts)]
        found["con"] = config.consistency_weight * reference.mean_cross_entropy(logits, con)
        shared = maps[1] if config.stage == 3 else method.branch.own(maps[0])
        branch = self.enlarged(method.branch.head(shared, torch.from_numpy(IDS)))
        pseudo = self.warped(torch.stack(self.columns(item.pseudo_masks)), matrices, IGNORE)
        pl = [self.masked(one, known) for one, known in zip(pseudo, counts)]
        found["pl"] = config.pseudo_weight * reference.mean_cross_entropy(branch, pl)
        return found

    @torch.no_grad()
    def taught(self, item: Batch, matrices) -> list[torch.Tensor]:
        backbone, head = copy.deepcopy(
            self.teacher
            if self.config.teacher == "ema"
            else (self.method.backbone, self.method.head)
        )
        backbone.eval()
        low = head(backbone(item.images, item.valid)[1], torch.from_numpy(IDS))
        if self.config.target == "hard":
            labels = torch.stack([logits.argmax(dim=0) for logits in self.enlarged(low)])
            return [*self.warped(labels, matrices, IGNORE)]
        return [
            torch.stack([reference.warped_nearest(part, matrix, 0.0) for part in q.softmax(dim=0)])
            for q, matrix in zip(self.enlarged(low), matrices)
        ]

    @staticmethod
    def enlarged(logits):
        return [reference.enlarged(one, STRIDE, SIZE) for one in logits]

    @staticmethod
    def warped(maps, matrices, outside):
        return torch.stack(
            [reference.warped_nearest(one, matrix, outside) for one, matrix in zip(maps, matrices)]
        )

    @staticmethod
    def masked(target, known):
        return torch.where(known, target, torch.tensor(IGNORE, dtype=target.dtype))

    @staticmethod
    def columns(masks) -> list[torch.Tensor]:
        column = torch.full_like(masks, IGNORE)
        for index, class_id in enumerate(IDS.tolist()):
            column[masks == class_id] = index
        return [*column]


VARIANTS = {
    "stage 2": {},
    "stage 3": {"stage": 3},
    "its own teacher": {"teacher": "student"},
    "soft": {"target": "soft", "stage": 3},
    "without strong augmentation": {"strong": False},
    "cut-out pixels ignored": {"keep_cutout_pixels": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_nested_loops(variant):
    """Losses, gradients and, after each step, the teacher with its BatchNorm statistics."""
    config = replace(CONFIG, randaugment_chance=0.8, **VARIANTS[variant])
    method = build(config).train()
    twin = copy.deepcopy(method)
    loops = ByLoops(twin)
    optimizer = torch.optim.SGD(method.parameters(), 0.05)
    teacher = {name: tensor.clone() for name, tensor in averaged(method).items()}
    for step in range(NUM_STEPS):
        twin.load_state_dict(method.state_dict())
        expected = loops.step(step)
        found: dict[str, torch.Tensor] = {}
        for slot in range(3):
            with recording(method, slot):
                losses = method(batch(step, slot), clock(step, slot))
            (sum(losses.values()) / 3).backward()
            for name, loss in losses.items():
                found[name] = found.get(name, 0) + loss.detach() / 3
        names = {"seg": "seg", "consistency": "con", "pseudo": "pl"}
        assert {names[name] for name in found} == set(expected)
        for name, loss in found.items():
            torch.testing.assert_close(loss, expected[names[name]].detach(), msg=name)
        twin.zero_grad()
        sum(expected.values()).backward()
        for (name, one), other in zip(method.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9, msg=name)
        optimizer.step()
        optimizer.zero_grad()
        commit_statistics(method)
        method.after_step(clock(step))
        if method.teacher is None:
            continue
        decay = {0: 0.99, 1: 0.99, 2: 0.995, 3: 0.995, 4: 0.9975, 5: 0.999}[step]
        assert method.summary(clock(step)) == {"teacher/decay": decay}
        reference.moved(teacher, averaged(method), decay)
        for name, tensor in averaged(method.teacher).items():
            torch.testing.assert_close(tensor, teacher[name], rtol=1e-12, atol=1e-14, msg=name)
        backbone, head = loops.teacher
        backbone.load_state_dict(method.teacher.backbone.state_dict())
        head.load_state_dict(method.teacher.head.state_dict())
    if method.teacher is not None:
        assert any("running_var" in name for name in teacher)
        weight = method.teacher.backbone.conv5[1].running_mean
        assert not torch.equal(weight, method.backbone.conv5[1].running_mean)


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
