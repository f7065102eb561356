"""Run files: their settings are the paper's, `--smoke` builds and runs them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from memseg_dist.assemble import build_label_space
from memseg_dist.config import LaunchConfig, RunConfig, from_json, to_json
from memseg_dist.data.index import Index
from memseg_dist.data.source import open_index
from memseg_dist.methods.mcibi.network import Network
from memseg_dist.methods.rca.fusion import RULES
from memseg_dist.methods.rca.labeller import ActivationLabeller
from memseg_dist.nn.backbone import build_backbone
from memseg_dist.pipeline import main, parse
from memseg_dist.stages import is_reference, resolved
from memseg_dist.tools import miniature
from memseg_dist.train.optim import learning_rate

ROOT = Path(__file__).resolve().parents[2]
PIPELINES = (
    "rca_voc",
    "rca_coco",
    "rca_scenes",
    "rca_folder",
    "pretrain_scenes",
    "pretrain_folder",
)
MCIBI = (
    "mcibi_ade",
    "mcibi_cityscapes",
    "mcibi_lip",
    "mcibi_coco_stuff",
    "mcibi_scenes",
    "mcibi_folder",
)
SEMI = (
    "pseudoseg_voc",
    "pseudoseg_coco",
    "pseudoseg_scenes",
    "pseudoseg_folder",
    "three_stage_voc",
    "three_stage_cityscapes",
    "three_stage_scenes",
    "three_stage_folder",
)
JOBS = ("larvseg_21k", "larvseg_ade", "larvseg_scenes", "larvseg_folder", *PIPELINES, *MCIBI, *SEMI)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def job(monkeypatch):
    """The module `jobs/NAME.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    return importlib.import_module


def stages_of(module, **options):
    return module.stages(module.Options(**options))


@pytest.mark.parametrize("name", JOBS)
def test_the_runs_survive_json_and_default_to_ray_and_deepspeed(job, name):
    smoke = {"smoke": True} if name == "rca_folder" else {}  # else it reads vocabularies
    for stage in resolved(stages_of(job(name), **smoke)).values():
        if isinstance(stage, RunConfig):
            assert from_json(to_json(stage)) == stage
            assert stage.launch.launcher == "ray" and stage.engine.kind == "deepspeed"


@pytest.mark.parametrize("name", JOBS)
def test_smoke_draws_what_every_run_reads(job, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    module = job(name)
    options, stages = parse(module.Options, module.stages, arguments=["--smoke"])
    miniature.draw(stages, module.vocabularies(options))
    for stage in resolved(stages).values():
        if isinstance(stage, RunConfig) and "pseudo" not in [item.name for item in stage.sources]:
            space = build_label_space(stage)
            for source in stage.sources:
                index = Index.open(source.path)
                shown = min(len(index.vocabulary), 1000)
                least = max([8, *(other.slots for other in stage.sources)])
                assert 8 <= len(index) <= max(least, -(-shown // 4) if index.num_masks else 0)
                assert len(open_index(source, tmp_path / "cache")) >= source.slots
                assert len(space.ids(source.name)) == len(index.vocabulary)
            if stage.validation is not None:
                assert {*stage.validation.base, *stage.validation.novel} <= {*space.vocabulary.uids}


@pytest.mark.parametrize(
    ("options", "counts", "weights", "slots", "threshold"),
    [
        ({}, (58, 92), (0.1, 0.1), (4, 4), 2.0),
        ({"imagenet": True}, (58, 92), (0.2, 0.1), (3, 3, 2), 2.0),
        ({"classes": 847}, (92, 755), (0.2, 0.1), (4, 4), 1.0),
        ({"classes": 847, "imagenet": True}, (92, 755), (0.2, 0.1), (3, 3, 2), 1.0),
        ({"protocol": "head"}, (63, 87), (0.1, 0.1), (4, 4), 2.0),
    ],
)
def test_ade_has_the_papers_settings(job, options, counts, weights, slots, threshold):
    run = stages_of(job("larvseg_ade"), **options)["train"]
    assert (len(run.validation.base), len(run.validation.novel)) == counts
    assert (run.method.cls_weight, run.method.aux_weight) == weights
    assert tuple(source.slots for source in run.sources) == slots
    assert {source.batch_per_slot for source in run.sources} == {2}
    assert [source.augment.crop for source in run.sources] == [512, 512, 320][: len(slots)]
    assert run.method.distance_threshold == threshold
    assert (run.method.capacity, run.method.top_k) == (20, 20)
    assert (run.optimizer.kind, run.optimizer.lr, run.steps) == ("sgd", 1e-3, 320_000)
    baseline = stages_of(job("larvseg_ade"), **options, baseline=True)["train"]
    assert baseline.method == dataclasses.replace(run.method, attention="off")


def test_the_papers_ablations_are_flags_of_the_ade_job(job):
    module = job("larvseg_ade")

    def run(*flags):
        return parse(module.Options, module.stages, arguments=[*flags])[1]["train"]

    half = run("--imagenet", "--method.source-weights", "weak_ade/aux", "0")
    assert half.method.source_weights == {"weak_ade/aux": 0.0}
    basic = run("--segmenter")
    assert ([s.name for s in basic.active_sources], basic.num_slots) == (["coco_stuff"], 8)
    assert (basic.name, basic.method.attention) == ("segmenter_ade20k_150", "off")
    flags = ["--sources.0.slots", "0", "--sources.1.slots", "8", "--sources.1.supervision", "masks"]
    (seen,) = run("--segmenter", *flags).active_sources
    assert (seen.name, seen.supervision) == ("weak_ade", "masks")
    flags = ["--sources.1.labels-from", "index", "--sources.1.hide-mask"]
    weak = run(*flags).sources[1]
    assert (weak.labels_from, weak.hide_mask) == ("index", True)


def test_the_relabelling_of_a_split_is_in_the_config(job):
    run = stages_of(job("larvseg_ade"))["train"]
    assert [item.source for item in run.relabel] == ["coco_stuff", "weak_ade", "ade"]
    classes = json.loads(run.relabel[0].classes)
    assert classes["n02834778"] == {"uid": "name:bicycle", "name": "bicycle", "synonyms": []}
    assert len(classes) == 171


def test_21k_keeps_the_whole_vocabulary(job):
    module = job("larvseg_21k")
    assert len(module.vocabularies(module.Options())["imagenet21k"]) == 21_841
    assert stages_of(module)["train"].steps == 1_280_000


def test_smoke_shrinks_the_pictures_but_neither_slots_nor_memory(job):
    run = stages_of(job("larvseg_21k"))["train"]
    small = miniature.shrunk({"train": run})["train"]
    assert small.num_slots == run.num_slots == 8
    assert small.method == dataclasses.replace(run.method, warm_up=1)
    assert small.launch == LaunchConfig(workers=2, max_failures=0)
    assert (small.relabel, small.validation.novel) == (run.relabel, run.validation.novel)


def test_rca_has_the_papers_settings(job):
    from memseg_dist.methods.rca.config import RCAConfig, released

    stages = stages_of(job("rca_voc"))
    run = stages["classifier"]
    assert run.method == RCAConfig()
    method = run.method
    weights = (method.contrast_weight, method.intermediate_weight, method.momentum)
    assert weights == (0.01, 0.4, 0.99)
    assert (method.gate, method.temperature, method.mixup_beta) == (0.7, 0.07, 8.0)
    assert method.num_prototypes == 10 and method.capacity is None
    assert sum(source.slots * source.batch_per_slot for source in run.sources) == 8
    optimizer = run.optimizer
    assert (optimizer.lr, optimizer.backbone_lr_scale, optimizer.bias_lr_scale) == (1e-2, 0.1, 2.0)
    assert optimizer.nesterov and optimizer.milestones == (5 * 1323, 10 * 1323)
    assert run.steps == 30 * 1323
    segmenter = stages["segmenter"]
    assert (segmenter.backbone.name, segmenter.steps) == ("resnet101.tv_in1k", 20_000)
    assert segmenter.sources[0].slots * segmenter.sources[0].batch_per_slot == 10
    code = stages_of(job("rca_voc"), preset="released")["classifier"].method
    assert code == released()
    assert (code.warmup_epochs, code.kmeans_starts) == (2, 10)
    baseline = stages_of(job("rca_coco"), baseline=True)["classifier"].method
    assert (baseline.contrast_weight, baseline.aggregation) == (0.0, "off")


COMMON = {"optimizer.kind": "sgd", "optimizer.momentum": 0.9, "optimizer.power": 0.9}
ADE = {
    "method.context": "aspp", "method.memory": "features", "method.consistency_weight": 1.0,
    "method.momentum": 0.9, "optimizer.lr": 0.01, "optimizer.weight_decay": 5e-4,
    "crop": (512, 512), "slots": (2, 8), "steps": 130 * 20_210 // 16,
    "backbone.name": "resnet50c.gluon_in1k",
    "backbone.output_stride": 8, "validation.mode": "whole", "validation.resize": (2048, 512),
    "validation.scales": (1.0,), "validation.flip": False,
}  # fmt: skip
SLOWER = {"optimizer.lr": 0.004, "steps": 180 * 20_210 // 16, "optimizer.weight_decay": 5e-4}
VIT = {
    "method.stages": (9, 14, 19, 23), "method.rates": (6, 12, 18), "method.aux_heads": (-4, -3, -2),
    "optimizer.weight_decay": 0.0, "optimizer.backbone_lr_scale": 0.1, "backbone.image_size": 512,
    "validation.mode": "slide", "validation.window": 512, "validation.stride": 341,
}  # fmt: skip
CITYSCAPES = {
    "crop": (512, 1024), "slots": (2, 4), "steps": 220 * 2_975 // 8, "optimizer.lr": 0.01,
    "optimizer.weight_decay": 5e-4, "validation.mode": "whole", "validation.resize": (2048, 1024),
    "method.downsample": False,
}  # fmt: skip
LIP = {
    "crop": (473, 473), "slots": (4, 8), "steps": 150 * 30_462 // 32, "optimizer.lr": 0.01,
    "validation.resize": (473, 473), "validation.keep_ratio": False, "validation.mode": "whole",
    "method.downsample": False, "validation.flip": False,
}  # fmt: skip
STUFF = {
    "crop": (512, 512), "slots": (2, 8), "steps": 110 * 9_000 // 16, "optimizer.lr": 0.001,
    "optimizer.weight_decay": 1e-4,
}  # fmt: skip
OFF = {"method.consistency_weight": 0.0}
NO_LONG_MEAN = OFF | {"method.momentum": 1.0}
VIEWS = {
    "validation.scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "validation.flip": True,
    "validation.average": "probabilities",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("ade", {}, ADE),
        ("ade", {"net": "resnest101"}, ADE | SLOWER | {"backbone.name": "resnest101e.in1k"}),
        ("ade", {"net": "hrnet_w48"}, SLOWER | {"method.downsample": False}),
        ("ade", {"net": "vit_large"}, VIT | {"optimizer.lr": 0.01}),
        ("ade", {"net": "swin_large"}, {"optimizer.kind": "adamw", "method.context": "uper"}),
        ("ade", {"baseline": True}, ADE | {"method.memory": "off"}),
        ("ade", {"multiscale": True}, ADE | VIEWS | {"every.evaluate": 130 * 20_210 // 16}),
        ("ade", {"preset": "released"}, ADE | {"method.consistency_norm": "batch"}),
        ("ade", {"preset": "paper"}, {"method.transform_layers": 1, "optimizer.min_lr": 0.0}),
        ("cityscapes", {}, CITYSCAPES),
        ("cityscapes", {"preset": "released"}, CITYSCAPES | NO_LONG_MEAN),
        (
            "cityscapes",
            {"trainval": True, "multiscale": True},
            CITYSCAPES | VIEWS | {"slots": (4, 4), "steps": 440 * 3_475 // 16}
            | {"validation.mode": "slide", "validation.window": (512, 1024)},
        ),
        (
            "cityscapes",
            {"trainval": True, "net": "hrnet_w48"},
            {"steps": 500 * 3_475 // 16, "method.downsample": True, "method.aux_heads": ()},
        ),
        ("lip", {}, LIP),
        ("lip", {"preset": "released"}, LIP | OFF | {"method.momentum": 0.9}),
        ("lip", {"multiscale": True}, LIP | {"validation.flip": True}),
        (
            "lip",
            {"net": "hrnet_w48"},
            {"optimizer.lr": 0.007, "slots": (5, 8), "steps": 150 * 30_462 // 40}
            | {"method.downsample": True, "method.pixels": "all"},
        ),
        ("coco_stuff", {}, STUFF),
        ("coco_stuff", {"preset": "released"}, STUFF | NO_LONG_MEAN),
        ("coco_stuff", {"multiscale": True}, STUFF | VIEWS | {"validation.mode": "slide"}),
        ("coco_stuff", {"net": "vit_large"}, VIT | {"optimizer.lr": 0.001}),
        (
            "coco_stuff",
            {"net": "resnest101"},
            STUFF | {"slots": (4, 8), "optimizer.weight_decay": 5e-4, "steps": 150 * 9_000 // 32},
        ),
        (
            "coco_stuff",
            {"release": "164k", "preset": "released"},
            STUFF
            | {"optimizer.lr": 0.01, "optimizer.weight_decay": 5e-4, "steps": 30 * 118_287 // 16}
            | {"method.consistency_weight": 1.0, "method.momentum": 0.9},
        ),
    ],
)  # fmt: skip
def test_mcibi_has_the_papers_settings(job, name, options, wanted):
    run = stages_of(job(f"mcibi_{name}"), **options)["train"]
    (source,) = run.sources
    found = {"crop": source.augment.crop_size, "slots": (source.slots, source.batch_per_slot)}
    is_sgd = wanted.get("optimizer.kind") != "adamw"
    for key in (COMMON if is_sgd else {}) | wanted:
        if key not in found:
            value = run
            for part in key.split("."):
                value = getattr(value, part)
            found[key] = value
    assert found == found | (COMMON if is_sgd else {}) | wanted
    if options.get("preset") != "paper":
        assert run.optimizer.min_lr == run.optimizer.lr / 100
    assert run.launch.workers == (1, source.slots)
    assert not is_sgd or run.optimizer.decay_norms_and_biases


def test_lips_pictures_turn_and_their_left_is_right_in_a_mirror(job):
    run = stages_of(job("mcibi_lip"))["train"]
    (source,) = run.sources
    augment = source.augment
    assert (augment.resize, augment.scale_range) == ((520, 520), (0.75, 1.25))
    assert (augment.rotate, augment.rotate_chance, augment.keep_ratio) == (30.0, 0.6, False)
    assert source.swap_on_flip == run.validation.swap
    assert ("name:left arm", "name:right arm") in source.swap_on_flip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"net": "hrnet_w48", "context": "uper"}, "--context uper reads the maps of several"),
    ],
)
def test_nets_and_contexts_that_do_not_fit(job, options, message):
    with pytest.raises(ValueError, match=message):
        stages_of(job("mcibi_ade"), **options)


@pytest.mark.parametrize(
    ("net", "context", "name", "stride"),
    [
        *((net, "aspp", "ade", 8) for net in ("resnet50", "resnet101", "resnest101")),
        ("hrnet_w48", "aspp", "ade", 4),
        ("hrnet_w48", "ocr", "ade", 4),
        ("hrnet_w48", "aspp", "cityscapes", 8),
        ("hrnet_w48", "aspp", "lip", 8),
        ("vit_large", "aspp", "ade", 16),
        ("swin_large", "auto", "ade", 4),
        ("convnext_base", "auto", "ade", 4),
        ("resnet50", "ocr", "cityscapes", 8),
    ],
)
def test_every_net_gives_the_papers_stride(job, monkeypatch, net, context, name, stride):
    """Built and run on the meta device, which holds no numbers; the weights that the hub has of the
    net fit it by name and shape.
    """
    # there is no autocast of the meta device, not even one that is off
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    run = stages_of(job(f"mcibi_{name}"), net=net, context=context)["train"]
    height, width = run.sources[0].augment.crop_size
    with torch.device("meta"):
        config = dataclasses.replace(run.backbone, pretrained="")
        backbone = build_backbone(config, run.method.stages)
        head = Network(run.method, backbone.stages, 19)
        outputs = head(backbone(torch.zeros(2, 3, height, width, dtype=torch.uint8)))
        whole = timm.create_model(run.backbone.name)
    filled = [-(-side // backbone.stride) * backbone.stride for side in (height, width)]
    assert outputs.logits.shape == (2, 19, filled[0] // stride, filled[1] // stride)
    assert outputs.pixels.shape == (2, 512, *outputs.logits.shape[2:])
    assert len(outputs.auxiliary) == len(run.method.aux_heads)
    of_whole = {key.replace(".", "_"): part.shape for key, part in whole.state_dict().items()}
    for key, part in backbone.net.state_dict().items():
        if key != "pos_embed":  # resized
            assert of_whole[key.replace(".", "_")] == part.shape, key


def test_rcas_options_reach_every_stage(job, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = [
        *("--name", "mine", "--storage", "S", "--seed", "3", "--launch.launcher", "local"),
        *("--eps", "--saliency", "maps", "--segmenter.steps", "9", "--classifier.steps", "70"),
        *("--labels.num-pictures", "3", "--truth", "T"),
    ]
    module = job("rca_voc")
    _, stages = parse(module.Options, module.stages, arguments=flags)
    classifier, labels, segmenter = stages.values()
    assert Path(classifier.sources[0].saliency).resolve() == tmp_path / "maps"
    assert labels.labeller == ActivationLabeller(maps="predicted", fusion=RULES["eps"])
    assert (classifier.method.saliency_weight, classifier.steps) == (1.0, 70)
    assert (labels.workers, labels.truth, labels.num_pictures) == (0, "T", 3)
    assert (segmenter.name, segmenter.storage, segmenter.seed) == ("mine_segmenter", "S", 3)
    assert (segmenter.steps, segmenter.sources[0].saliency) == (9, None)
    assert is_reference(segmenter.sources[0].path)
    pseudo = resolved(stages)["segmenter"].sources[0].path
    assert pseudo == str(tmp_path / "S" / "mine" / "labels")


def test_rcas_jobs_label_by_anyones_rules(job, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = job("rca_voc")

    def labeller(*flags):
        flags = [*flags, "--saliency", "maps"]
        return parse(module.Options, module.stages, arguments=flags)[1]["labels"].labeller

    assert labeller() == labeller("--rules", "rca")
    assert labeller("--rules", "oaa") == dataclasses.replace(labeller(), fusion=RULES["oaa"])
    assert labeller("--eps", "--rules", "oaa") == labeller("--rules", "oaa")
    assert labeller("--eps") == labeller("--rules", "eps")
    changed = labeller("--eps", "--labels.labeller.fusion.background-score", "0.3")
    assert changed.fusion == dataclasses.replace(RULES["eps"], background_score=0.3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eps"], "--eps needs --saliency"),
        (["--net", "resnet38"], "--net resnet38 needs --weights"),
        (["--launch.workers", "9"], "launch.workers 9 is more than the 4 slots"),
        ([], "truth shards/voc2012/train has no shards"),
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_runs(
    job, monkeypatch, tmp_path, flags, message
):
    monkeypatch.chdir(tmp_path)
    module = job("rca_voc")
    with pytest.raises(SystemExit) as caught:
        main(module.Options, module.stages, module.vocabularies, None, flags)
    assert message in str(caught.value.code) and "\n" not in str(caught.value.code)
    assert not any(tmp_path.iterdir())


LOCAL = {
    "larvseg_21k": ("",),
    "larvseg_folder": ("",),
    "mcibi_lip": ("",),
    "pretrain_scenes": ("train.",),
    "rca_scenes": ("classifier.", "segmenter."),
}


@pytest.mark.parametrize("name", LOCAL)
def test_smoke(job, monkeypatch, tmp_path, capsys, name):
    """In this process; the slow test below runs all jobs through Ray and DeepSpeed."""
    monkeypatch.chdir(tmp_path)
    module = job(name)
    torch_engine = [part for stage in LOCAL[name] for part in (f"--{stage}engine.kind", "torch")]
    local = ["--launch.launcher", "local", "--launch.workers", "1", "--tracking.kind", "console"]
    arguments = ["--smoke", *local, *torch_engine]
    main(module.Options, module.stages, module.vocabularies, None, arguments)
    run, *segmenter = sorted((tmp_path / "runs").iterdir())
    printed = capsys.readouterr().out
    for directory in (run, *segmenter):
        assert (directory / "checkpoints" / "step-00000004" / "manifest.json").exists()
        assert f"run         {directory}" in printed
    assert len(segmenter) == (name == "rca_scenes")
    if name == "rca_scenes":
        assert (run / "labels" / "index.parquet").exists()
        assert any((run / "labels" / "panels").rglob("*.png"))
        assert "mIoU" in printed
    assert (run / "backbone.safetensors").exists() == (name == "pretrain_scenes")
    assert any((run / "panels").rglob("*.png")) != (name == "pretrain_scenes")


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_smoke_through_ray_and_deepspeed(tmp_path, name):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "jobs" / f"{name}.py", "--smoke"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = [path for path in (tmp_path / "runs").iterdir() if "smoke" in path.name]
    assert len(runs) == (3 if name.startswith("three") else 1 + name.startswith("rca"))
    for run in runs:
        assert (run / "checkpoints" / "step-00000004" / "manifest.json").exists()
    assert "mlflow ui --backend-store-uri sqlite:///" in done.stdout


# -------------------------------------------------------------------- few masks


@pytest.mark.parametrize(
    ("net", "decay", "dropout"), [("xception65", 4e-5, 0.5), ("resnet101", 1e-4, 0.0)]
)
def test_pseudoseg_has_the_papers_settings(job, net, decay, dropout):
    run = stages_of(job("pseudoseg_voc"), split="1_16-seed0", net=net)["train"]
    few, everything = run.sources
    assert (few.supervision, few.split, few.labels_from) == ("masks", "1_16-seed0", "crop")
    assert few.path.endswith("/train") and everything.path.endswith("/train_aug")
    assert (everything.supervision, everything.split) == ("none", None)
    assert {(s.slots, s.batch_per_slot, s.augment.crop) for s in run.sources} == {(16, 4, 513)}
    assert not everything.augment.photometric and everything.augment.scale_range == (0.5, 2.0)
    optimizer = run.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.power, optimizer.min_lr) == (
        "sgd",
        7e-3,
        0.9,
        0,
    )
    assert (optimizer.weight_decay, optimizer.bias_lr_scale, run.steps) == (decay, 2.0, 30_000)
    method = run.method
    assert (method.gamma, method.temperature, method.classifier_dropout) == (0.5, 0.5, dropout)
    assert run.backbone.output_stride == 16 and method.background == "background"
    coco = stages_of(job("pseudoseg_coco"))["train"]
    assert (coco.steps, coco.optimizer.lr) == (200_000, 7e-3)


@pytest.mark.parametrize(
    ("labels", "kind", "of"),
    [("none", "none", "index"), ("image", "labels", "index"), ("crop", "labels", "crop")],
)
def test_pseudoseg_takes_image_labels_of_the_image_or_of_the_crop(job, labels, kind, of):
    _, everything = stages_of(job("pseudoseg_voc"), image_labels=labels)["train"].sources
    assert (everything.supervision, everything.labels_from) == (kind, of)
    assert everything.hide_mask


@pytest.mark.parametrize("name", SEMI)
def test_the_recipes_to_compare_with_have_the_same_network_and_steps(job, name):
    module = job(name)
    options = {"smoke": True, "split": "a"} if name.endswith("folder") else {"split": "a"}
    own = stages_of(module, **options)
    last = [*own.values()][-1]
    plain = stages_of(module, **options, recipe="supervised")
    assert [*plain] == ["train"]
    train = plain["train"]
    assert [source.split for source in train.sources] == ["a"]
    offline = stages_of(module, **options, recipe="self-training")
    assert [*offline] == ["teacher", "labels", "student"]
    assert offline["labels"].labeller.threshold == 0.5
    assert not offline["labels"].labeller.restrict_to_labels, "labels of the index would leak"
    student = offline["student"]
    assert student.sources[1].supervision == "masks"
    assert student.sources[1].path == "stage:labels"
    assert student.sources[0] == train.sources[0]
    for run in (train, offline["teacher"], student):
        assert (run.backbone, run.optimizer, run.steps) == (
            last.backbone,
            last.optimizer,
            last.steps,
        )
        assert run.method == train.method
    names = [run.name for run in (train, *offline.values(), *own.values()) if hasattr(run, "name")]
    assert len(names) == len(set(names)), "each run needs a directory of its own"


@pytest.mark.parametrize(
    ("name", "crop", "weight", "first_steps", "unlabelled"),
    [("voc", 321, 0.25, 10_000, 9), ("cityscapes", (256, 512), 0.5, 20_000, 4)],
)
def test_three_stage_has_the_papers_settings(job, name, crop, weight, first_steps, unlabelled):
    stages = stages_of(job(f"three_stage_{name}"), split="100-seed0")
    assert [*stages] == ["stage1", "labels1", "stage2", "labels2", "stage3"]
    assert (stages["stage1"].steps, stages["stage1"].method.kind) == (first_steps, "segment")
    for number, labels in ((2, "labels1"), (3, "labels2")):
        run = stages[f"stage{number}"]
        few, everything = run.sources
        assert (run.method.stage, run.steps) == (number, 60_000)
        assert (run.method.consistency_weight, run.method.pseudo_weight) == (weight, weight)
        assert {source.pseudo_masks for source in run.sources} == {f"stage:{labels}"}
        assert few.slots * few.batch_per_slot == 1
        assert everything.slots * everything.batch_per_slot == unlabelled
        assert (few.split, everything.split) == ("100-seed0", None)
        assert everything.supervision == "none" and few.augment.crop == crop
        assert run.backbone.frozen_batchnorm and run.backbone.output_stride == 8
        assert (run.optimizer.kind, run.optimizer.weight_decay) == ("adamw", 0.0)
        assert learning_rate(run.optimizer, 59_999, 60_000) == run.optimizer.lr == 3e-5
    for labels in ("labels1", "labels2"):
        labeller = stages[labels].labeller
        assert (labeller.threshold, labeller.restrict_to_labels) == (0.0, False)
