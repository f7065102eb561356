"""Run files: their settings are the paper's, their flags work, and `--smoke` runs."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memseg_dist.config import LaunchConfig, from_json, to_json
from memseg_dist.runtime import jobs

ROOT = Path(__file__).resolve().parents[2]
JOBS = {
    "larvseg_21k": "LarvSeg21k",
    "larvseg_ade": "LarvSegAde",
    "larvseg_scenes": "LarvSegScenes",
    "larvseg_folder": "LarvSegFolder",
    "rca_voc": "RcaVoc",
    "rca_coco": "RcaCoco",
    "rca_scenes": "RcaScenes",
    "rca_folder": "RcaFolder",
    "pretrain_scenes": "PretrainScenes",
    "pretrain_folder": "PretrainFolder",
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def job_kind(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))

    def load(name: str) -> type[jobs.Job]:
        return getattr(importlib.import_module(name), JOBS[name])

    return load


@pytest.mark.parametrize("name", JOBS)
def test_config_survives_json(job_kind, name):
    config = job_kind(name)(smoke=name == "rca_folder").config()  # it reads vocabularies
    assert from_json(to_json(config)) == config
    assert config.launch.launcher == "ray" and config.engine.kind == "deepspeed"


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
def test_ade_has_the_papers_settings(job_kind, options, counts, weights, slots, threshold):
    config = job_kind("larvseg_ade")(**options).config()
    assert (len(config.validation.base), len(config.validation.novel)) == counts
    assert (config.method.cls_weight, config.method.aux_weight) == weights
    assert tuple(source.slots for source in config.sources) == slots
    assert {source.batch_per_slot for source in config.sources} == {2}
    assert [source.augment.crop for source in config.sources] == [512, 512, 320][: len(slots)]
    assert config.method.distance_threshold == threshold
    assert (config.method.capacity, config.method.top_k) == (20, 20)
    assert (config.optimizer.kind, config.optimizer.lr, config.steps) == ("sgd", 1e-3, 320_000)
    baseline = job_kind("larvseg_ade")(**options, baseline=True).config()
    assert baseline.method == dataclasses.replace(config.method, attention="off")


def test_21k_keeps_the_whole_vocabulary(job_kind):
    job = job_kind("larvseg_21k")()
    assert len(job.vocabularies()["imagenet21k"]) == 21_841
    assert job.config().steps == 1_280_000


def test_smoke_shrinks_the_pictures_but_neither_slots_nor_memory(job_kind):
    config = job_kind("larvseg_21k")().config()
    small = jobs.shrunk(config)
    assert small.num_slots == config.num_slots == 8
    assert small.method == dataclasses.replace(config.method, warm_up=1)
    assert small.launch == LaunchConfig(workers=2, max_failures=0)


def run_main(kind, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    jobs.main(kind, "A test.")


def test_flags_override_the_config_and_unknown_ones_are_errors(job_kind, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(jobs, "launch", lambda config: seen.append(config) or {"status": "stopped"})
    kind = job_kind("larvseg_scenes")
    flags = ["--baseline", "--optimizer.lr", "0.5", "--sources.1.slots", "3", "--launch.workers"]
    run_main(kind, monkeypatch, *flags, "1", "4")
    (config,) = seen
    assert (config.method.attention, config.optimizer.lr) == ("off", 0.5)
    assert (config.sources[1].slots, config.launch.workers) == (3, (1, 4))
    assert Path(config.storage).is_absolute()
    with pytest.raises(SystemExit) as caught:
        run_main(kind, monkeypatch, "--basline")
    assert caught.value.code == 2
    assert "--baseline" in capsys.readouterr().err


def test_rca_has_the_papers_settings(job_kind):
    from memseg_dist.methods.rca_config import RCAConfig, released

    config = job_kind("rca_voc")().config()
    assert config.method == RCAConfig()
    method = config.method
    assert (method.contrast_weight, method.intermediate_weight, method.momentum) == (
        0.01,
        0.4,
        0.99,
    )
    assert (method.gate, method.temperature, method.mixup_beta) == (0.7, 0.07, 8.0)
    assert method.num_prototypes == 10 and method.capacity is None
    assert sum(source.slots * source.batch_per_slot for source in config.sources) == 8
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.backbone_lr_scale, optimizer.bias_lr_scale) == (1e-2, 0.1, 2.0)
    assert optimizer.nesterov and optimizer.milestones == (5 * 1323, 10 * 1323)
    assert config.steps == 30 * 1323
    code = job_kind("rca_voc")(preset="released").config().method
    assert code == released()
    assert (code.warmup_epochs, code.kmeans_starts) == (2, 10)
    baseline = job_kind("rca_coco")(baseline=True).config().method
    assert (baseline.contrast_weight, baseline.aggregation) == (0.0, "off")


def test_a_later_stage_follows_the_run_and_has_flags_of_its_own(job_kind, monkeypatch, tmp_path):
    kind = job_kind("rca_voc")
    seen = {}
    monkeypatch.setattr(jobs, "launch", lambda config: {"status": "finished"})
    monkeypatch.setattr(kind, "prepare", lambda self, config: None)
    monkeypatch.setattr(kind, "finish", lambda self, config, result, stages: seen.update(stages))
    flags = ["--name", "mine", "--storage", str(tmp_path), "--seed", "3", "--steps", "70"]
    run_main(kind, monkeypatch, *flags, "--segmenter.steps", "9", "--segmenter.seed", "4")
    segmenter = seen["segmenter"]
    assert (segmenter.name, segmenter.storage) == ("mine_segmenter", str(tmp_path))
    assert (segmenter.steps, segmenter.seed) == (9, 4)
    assert segmenter.sources[0].path == str(tmp_path / "mine" / "labels")
    run_main(kind, monkeypatch, *flags)
    assert (seen["segmenter"].steps, seen["segmenter"].seed) == (20_000, 3)


def test_the_road_checks_its_end_before_its_start(job_kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "launch", lambda config: pytest.fail("it began"))
    for flags, message in (
        (["--truth", "nowhere"], "--truth nowhere: no shards there"),
        (["--storage", "s3://bucket/runs"], "is a URL, which the pseudo masks cannot be written"),
        (["--eps"], "--eps needs --saliency"),
        (["--net", "resnet38"], "--net resnet38 needs --backbone.pretrained"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_main(job_kind("rca_voc"), monkeypatch, *flags)
        assert message in str(caught.value.code)


def test_help_shows_the_jobs_options_and_every_key_of_the_config(job_kind, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(job_kind("larvseg_scenes"), monkeypatch, "--baseline", "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--smoke", "--baseline", "--backbone", "--launch.launcher", "--tracking.uri"):
        assert flag in text


def test_a_mistake_ends_in_one_line(job_kind, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        run_main(job_kind("larvseg_scenes"), monkeypatch, "--launch.workers", "9")
    assert "launch.workers 9 is more than the 4 slots" in str(caught.value.code)


@pytest.mark.parametrize("name", JOBS)
def test_smoke(job_kind, monkeypatch, tmp_path, capsys, name):
    """In this process; the slow test below runs the same through Ray and DeepSpeed."""
    monkeypatch.chdir(tmp_path)
    flags = ["--launch.launcher", "local", "--launch.workers", "1", "--engine.kind", "torch"]
    run_main(job_kind(name), monkeypatch, "--smoke", "--tracking.kind", "console", *flags)
    run, *segmenter = sorted((tmp_path / "runs").iterdir())
    assert (run / "checkpoints" / "step-00000004" / "manifest.json").exists()
    printed = capsys.readouterr().out
    assert f"run         {run}" in printed
    assert len(segmenter) == name.startswith("rca")
    for directory in segmenter:
        assert (run / "labels" / "index.parquet").exists()
        assert any((run / "labels" / "panels").glob("*.png"))
        assert (directory / "checkpoints" / "step-00000004" / "manifest.json").exists()
        assert f"run         {directory}" in printed
        assert ("mIoU" in printed) == (name == "rca_scenes")  # the others have no truth to compare
    assert (run / "backbone.safetensors").exists() == name.startswith("pretrain")
    assert any((run / "panels").glob("*.png")) != name.startswith("pretrain")


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_smoke_through_ray_and_deepspeed(tmp_path, name):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "jobs" / f"{name}.py", "--smoke"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = min(path for path in (tmp_path / "runs").iterdir() if "smoke" in path.name)
    assert (run / "checkpoints" / "step-00000004" / "manifest.json").exists()
    assert "mlflow ui --backend-store-uri sqlite:///" in done.stdout
