"""Every input that a run of Three-stage must refuse, and what reads its checkpoints."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.contract import run as run_contract
from train.shards import SIZE, larvseg_config, write_squares

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.config import EngineConfig, RunConfig, to_json
from memseg_dist.data.loader import Source
from memseg_dist.methods.labeller import ArgmaxLabeller, Picture
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.methods.three_stage.teacher import averaged
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.tools.pseudo_labels.model import CheckpointModel
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.load_model import load_model

SMALL = ThreeStageConfig(rates=(1, 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("squares")
    write_squares(root / "few", 4, 2, with_masks=True)
    write_squares(root / "many", 8, 2, with_masks=False)
    write_squares(root / "labels", 8, 2, with_masks=True)
    write_squares(root / "val", 3, 4, with_masks=True)
    return root


def run_config(data: Path, storage: Path | None = None, **changes) -> RunConfig:
    base = larvseg_config(data, storage or data / "runs")
    augment = base.sources[0].augment
    few, many = (
        Source(name, str(data / name), kind, augment=augment, pseudo_masks=str(data / "labels"))
        for name, kind in (("few", "masks"), ("many", "none"))
    )
    assert base.validation is not None
    defaults = {
        "sources": (few, replace(many, slots=2)),
        "method": SMALL,
        "validation": replace(base.validation, base=(), novel=(), exclude=("n2", "n3")),
        "engine": EngineConfig("torch"),
    }
    return dataclasses.replace(base, **(defaults | changes))


def refused(config: RunConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_method(config, build_label_space(config))


def with_sources(config: RunConfig, **of_all) -> RunConfig:
    return replace(config, sources=tuple(replace(s, **of_all) for s in config.sources))


def test_what_is_right_is_taken(data):
    config = run_config(data)
    build_method(config, build_label_space(config))


def test_no_labelled_image(data):
    config = run_config(data)
    refused(with_sources(config, supervision="none"), r"no labelled image: .*\['few', 'many'\]")


def test_labelled_images_alone(data):
    config = run_config(data)
    config = replace(config, sources=config.sources[:1])
    refused(config, r"no unlabelled image: all of the sources \['few'\].*'segment'")


def test_stage_2_without_the_result_of_stage_1(data):
    config = run_config(data)
    for stage in (2, 3):
        without = replace(config, method=replace(SMALL, stage=stage))
        few, many = without.sources
        refused(
            replace(without, sources=(few, replace(many, pseudo_masks=None))),
            f"'many' has no pseudo_masks: stage {stage}.*network of stage {stage - 1}.*first",
        )
    without = replace(config, method=replace(SMALL, pseudo_weight=0.0))
    build_method(with_sources(without, pseudo_masks=None), build_label_space(without))


def test_image_labels(data):
    config = run_config(data)
    few, many = config.sources
    labels = (few, replace(many, supervision="labels"))
    refused(replace(config, sources=labels), "'many' has supervision 'labels'.*'masks' or 'none'")


def test_a_class_without_a_labelled_pixel(data, tmp_path):
    """Whatever the unlabelled images would show."""
    write_squares(tmp_path / "few", 1, 4, with_masks=True)  # one image, of two classes
    shutil.copytree(data / "val", tmp_path / "val")
    write_squares(tmp_path / "many", 8, 4, with_masks=True)
    unseen = np.random.default_rng(0).permutation(4)[2:]
    config = run_config(tmp_path)
    assert config.validation is not None
    config = replace(config, validation=replace(config.validation, exclude=()))
    names = ", ".join(f"'n{k}'" for k in sorted(unseen))
    refused(config, rf"2 of the classes \[{names}\] are in no mask of the sources .*few")


def test_a_scored_class_that_no_source_has_masks_of(data):
    config = run_config(data)
    assert config.validation is not None
    every = replace(config, validation=replace(config.validation, exclude=()))
    refused(every, r"\['n2', 'n3'\], which no source has masks of.*--validation.exclude")


def test_labelled_sources_of_different_classes(data, tmp_path):
    write_squares(tmp_path / "more", 8, 4, with_masks=True)
    config = run_config(data)
    few, many = config.sources
    more = replace(few, name="more", path=str(tmp_path / "more"))
    refused(
        replace(config, sources=(few, more, many)),
        r"'few' and 'more' have different classes, \['n2', 'n3'\].*same vocabulary",
    )


def test_a_backbone_of_one_stage(data):
    config = run_config(data)
    options = config.backbone.options | {"depth": "1"}
    one = replace(config, backbone=replace(config.backbone, options=options))
    refused(one, r"stages \(-2, -1\) of backbone 'vit_tiny_patch16_224'")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"decays": ()}, "method.decays is"),
        ({"decays": (0.9, 1.5, 0.9, 0.9)}, "method.decays is"),
        ({"decays": (0.9,)}, "method.decay_until is .*0 rising shares"),
        ({"decay_until": (0.5, 0.4, 0.9)}, "method.decay_until is .*3 rising shares"),
        ({"decay_until": (0.5, 0.6, 1.0)}, "method.decay_until is"),
        ({"consistency_weight": -1.0}, "method.consistency_weight is -1.0"),
        ({"cutout_share": 2.0}, "method.cutout_share is 2.0; it must be from 0 to 1"),
        ({"randaugment_ops": -1}, "method.randaugment_ops is -1"),
        ({"branch_dilation": 0}, "method.branch_dilation is 0"),
    ],
)
def test_settings_that_make_no_sense(change, match):
    with pytest.raises(ValueError, match=match):
        replace(SMALL, **change)


# ---------------------------------------------------------------- its checkpoints


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> str:
    """A checkpoint whose teacher has other opinions than its student."""
    resnet = BackboneConfig("test_resnet", output_stride=8, drop_path=0.0)
    method = replace(SMALL, decays=(0.5,), decay_until=())
    config = run_config(data, tmp_path_factory.mktemp("run"), backbone=resnet, method=method)
    return run_contract(to_json(config))["checkpoint"]


def predicted(path: str | Path, **changes) -> torch.Tensor:
    """Of the method of a checkpoint as if the run had had other settings."""
    checkpoint = Checkpoint(str(path))
    config = replace(checkpoint.config, method=replace(checkpoint.config.method, **changes))
    checkpoint.__dict__["config"] = config
    method = load_model(checkpoint, torch.device("cpu")).method.eval()
    assert set(method.state()) == ({"teacher"} if not changes else set())
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    return method.predict(images.to(torch.uint8), torch.arange(2)).dense()


def test_a_model_that_predicts_has_the_teacher(trained):
    model = load_model(Checkpoint(trained), torch.device("cpu"))
    saved = Checkpoint(trained).reader("teacher")
    student = averaged(model.method)
    for name, tensor in averaged(model.method.teacher).items():
        assert torch.equal(tensor, saved(name)), name
    assert any(not torch.equal(saved(name), tensor) for name, tensor in student.items())
    assert not torch.equal(predicted(trained), predicted(trained, predict_with="student"))


def test_only_what_predicts_is_read(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "published")
    teacher = copy / "memory-teacher-00000-of-00001.safetensors"
    content = bytearray(teacher.read_bytes())
    content[-1] ^= 1
    teacher.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"memory-teacher-.* is damaged"):
        load_model(Checkpoint(str(copy)), torch.device("cpu"))
    teacher.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*memory-teacher-"):
        load_model(Checkpoint(str(copy)), torch.device("cpu"))
    alone = predicted(copy, predict_with="student")
    assert torch.equal(alone, predicted(trained, predict_with="student"))


def test_the_label_stage_labels_with_the_teacher(trained):
    model = CheckpointModel(Checkpoint(trained), "cpu")
    assert model.trained.tolist() == [0, 1]
    image = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
    labelled = ArgmaxLabeller(threshold=0.0).open(model)(Picture("a", image))
    assert labelled.mask.shape == (40, 48) and set(np.unique(labelled.mask)) <= {0, 1}
    first = model.segment(image, torch.tensor([0, 1]))[1]
    with torch.no_grad():
        model.method.head.bias.add_(torch.tensor([5.0, -5.0, 0.0, 0.0])[: len(model.label_space)])
    assert torch.equal(model.segment(image, torch.tensor([0, 1]))[1], first)
    with torch.no_grad():
        model.method.teacher.head.bias[0] += 5.0
    assert not torch.equal(model.segment(image, torch.tensor([0, 1]))[1], first)
