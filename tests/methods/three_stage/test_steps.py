"""Three-stage's whole steps against nested loops: losses, gradients, teacher."""

from __future__ import annotations

import copy
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from methods.three_stage.small import CONFIG, IDS, NUM_STEPS, SIZE, STRIDE, batch, build, clock
from reference import three_stage as reference

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.methods.three_stage.method import ThreeStage
from memseg_dist.methods.three_stage.strong import draw, draw_operators
from memseg_dist.methods.three_stage.teacher import averaged
from memseg_dist.nn.batchnorm import commit_statistics, recording


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
