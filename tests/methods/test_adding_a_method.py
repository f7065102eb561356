"""A third method, written from outside the package: nothing there is edited, one call registers it.

A mean teacher with a memory of one row per class. It inherits the contract of every method; here it
also goes through the stages of a job, with a labeller of its own.
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods.contract import MethodContract
from methods.contract import run as run_contract
from torch import nn

from memseg_dist.batch import IGNORE
from memseg_dist.config import LaunchConfig, TrackingConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.cache import ShardCache
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source
from memseg_dist.data.reader import Reader
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.memory.layouts import OnePerClass
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import WeightedMean, poly
from memseg_dist.methods.kinds import register
from memseg_dist.methods.labeller import Labelled, LabellerConfig
from memseg_dist.methods.method import LinearLogits, Method, MethodConfig
from memseg_dist.pipeline import PipelineOptions, main
from memseg_dist.stages import LabelConfig, result
from memseg_dist.train.load_model import find_checkpoint, load_model


@register
@dataclass(frozen=True)
class MeanTeacherConfig(MethodConfig):
    kind: Literal["mean_teacher"] = "mean_teacher"
    keep: float = 0.99

    def build(self, setup):
        return MeanTeacher(setup.build_backbone(), self, setup.num_classes, setup.device)

    def smoke(self):
        return replace(self, keep=0.5)


class MeanTeacher(Method):
    def __init__(self, backbone, config, num_classes, device):
        super().__init__()
        self.backbone, self.config = backbone, config
        self.head = nn.Linear(backbone.dim, num_classes)
        self.pupil = nn.ModuleList([backbone, self.head])
        self.teacher = copy.deepcopy(self.pupil).requires_grad_(False)
        rule = WeightedMean(poly(0.9))
        self.memory = ShardedRows(OnePerClass(num_classes), rule, backbone.dim, device=device)

    def forward(self, batch, clock):
        (features,) = self.backbone(batch.images, batch.valid)
        student = F.linear(features.movedim(1, -1), self.head.weight, self.head.bias).movedim(-1, 1)
        with torch.no_grad():
            taught = self._taught(batch.images).dense().softmax(dim=1)
        losses = {"consistency": F.mse_loss(student.softmax(dim=1), taught)}
        if batch.masks is not None:
            small = F.interpolate(batch.masks[:, None].double(), features.shape[-2:])[:, 0].long()
            losses["seg"] = F.cross_entropy(student, small, ignore_index=IGNORE)
            class_C = torch.arange(student.shape[1], device=small.device)
            is_class_CP = small.flatten() == class_C[:, None]
            sums_CD = is_class_CP.float() @ features.movedim(1, -1).flatten(0, 2)
            self.memory.propose(range(len(sums_CD)), sums_CD, clock, weight=is_class_CP.sum(dim=1))
        return losses

    @torch.no_grad()
    def after_step(self, clock):
        self.memory.commit(clock)
        for old, new in zip(self.teacher.parameters(), self.pupil.parameters(), strict=True):
            old.lerp_(new, 1 - self.config.keep)

    def state(self):
        return {"memory": self.memory}

    def _taught(self, images):
        backbone, head = self.teacher
        return LinearLogits(backbone(images)[0], head.weight, head.bias, stride=self.stride)

    @torch.no_grad()
    def predict(self, images, classes):
        taught = self._taught(images)
        return replace(taught, weight=taught.weight[classes], bias=taught.bias[classes])

    @torch.no_grad()
    def embed(self, images):
        return F.normalize(self.teacher[0](images)[0], dim=1)


@dataclass(frozen=True)
class TopLeftLabeller(LabellerConfig):
    """What the teacher says of the top left pixel, there; the rest of the picture is unknown."""

    kind: Literal["top_left"] = "top_left"

    def open(self, model):
        def label(picture):
            index, _ = model.segment(picture.image, torch.from_numpy(model.trained))
            mask = np.full(index.shape, IGNORE)
            mask[0, 0] = model.trained[int(index[0, 0])]
            return Labelled(mask, note={"seen": 1})

        return label


def run(config_json, stop_at=None):
    """In a worker, which knows the method because this module is imported."""
    return run_contract(config_json, stop_at)


class TestContract(MethodContract):
    method = MeanTeacherConfig()
    losses = {"masks": {"seg", "consistency"}, "weak": {"consistency"}}
    run = staticmethod(run)


# ------------------------------------------------------------------ as a job


@dataclass(frozen=True)
class Options(PipelineOptions):
    launch: LaunchConfig = LaunchConfig("local", workers=2)
    tracking: TrackingConfig = TrackingConfig("console")


def stages(options):
    augment = AugmentConfig(crop=64, resize=(64, 64))
    few = Source("few", "data/few", "masks", 1, 2, augment)
    many = Source("many", "data/many", "none", 2, 2, augment)
    run = options.run("toy", sources=(few, many), method=MeanTeacherConfig())
    labels = LabelConfig(
        result("train"), many.path, result("train") + "/labels", TopLeftLabeller(), workers=0
    )
    return {"train": run, "labels": labels}


def vocabularies(options):
    classes = Vocabulary(tuple(Category(f"toy:{n}", f"toy {n}") for n in range(4)))
    return {"few": classes, "many": classes}


def test_it_goes_through_the_stages_of_a_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(Options, stages, vocabularies, "A toy.", ["--smoke", "--train.name", "toy"])
    checkpoint = find_checkpoint("runs/toy")
    assert checkpoint.step == 4 and checkpoint.config.method == MeanTeacherConfig(keep=0.5)
    model = load_model(checkpoint, torch.device("cpu"), with_memories=True)
    assert model.method.memory.is_set.any()
    labels = Index.open(tmp_path / "runs/toy/labels")
    assert len(labels) == 8 and labels.num_masks == 8
    reader = Reader(
        labels, ShardCache(tmp_path / "cache", 0), np.arange(len(labels.vocabulary), dtype=np.int32)
    )
    for number in range(len(labels)):
        mask = reader.read(number, with_mask=True).mask
        assert (mask != IGNORE).sum() == 1 and mask[0, 0] != IGNORE


def test_a_kind_is_taken_once():
    with pytest.raises(ValueError, match="'mean_teacher' is taken by MeanTeacherConfig"):
        register(dataclass(frozen=True)(type("Other", (MeanTeacherConfig,), {})))
