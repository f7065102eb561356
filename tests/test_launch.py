"""What is decided before a worker starts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from platforms.tiny_run import tiny_run

from memseg_dist.config import LaunchConfig, TrackingConfig
from memseg_dist.launch import launch, provenance, tracking_uri
from memseg_dist.train.storage import make_writable

REPOSITORY = Path(__file__).resolve().parents[1]


def test_an_output_that_cannot_be_written_is_named_before_anything_starts(tiny_data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*/file/runs/tiny: .*--storage"):
        launch(tiny_run(tiny_data, tmp_path / "file" / "runs"))


def test_weights_that_are_not_there_are_named_before_anything_starts(tiny_data, tmp_path):
    run = tiny_run(tiny_data, tmp_path / "runs")
    backbone = replace(run.backbone, pretrained="gone.safetensors")
    with pytest.raises(ValueError, match=r"backbone weights '.*/gone.safetensors' do not exist"):
        launch(replace(run, backbone=backbone))
    assert not (tmp_path / "runs").exists()


def test_frozen_batchnorm_of_random_weights_is_refused_before_anything_starts(tiny_data, tmp_path):
    run = tiny_run(tiny_data, tmp_path / "runs")
    backbone = replace(run.backbone, frozen_batchnorm=True)
    with pytest.raises(ValueError, match=r"backbone.pretrained is ''; .*frozen_batchnorm keeps"):
        launch(replace(run, backbone=backbone))
    assert not (tmp_path / "runs").exists()


def test_the_probe_leaves_nothing(tmp_path):
    make_writable(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


def test_mlflows_default_lies_in_the_storage(tiny_data, tmp_path):
    config = tiny_run(tiny_data, tmp_path, tracking=TrackingConfig())
    assert tracking_uri(config) == f"sqlite:///{tmp_path}/mlflow.db"
    config = tiny_run(tiny_data, tmp_path, tracking=TrackingConfig(uri="http://tracking:5000"))
    assert tracking_uri(config) == "http://tracking:5000"


def test_a_url_cannot_hold_mlflows_default(tiny_data):
    config = tiny_run(tiny_data, "s3://bucket/runs", tracking=TrackingConfig())
    with pytest.raises(ValueError, match=r"s3://bucket/runs is a URL.*tracking\.uri"):
        tracking_uri(config)


def test_provenance_names_commit_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/larvseg_scenes.py", "--seed", "1"])
    tags = provenance()
    commit = tags["mlflow.source.git.commit"]
    assert commit == "unknown" or len(commit) == 40
    assert tags["memseg.command"] == f"{sys.executable} jobs/larvseg_scenes.py --seed 1"


def test_local_workers_give_what_one_gives(tiny_data, tmp_path):
    one = launch(tiny_run(tiny_data, tmp_path, "one"))
    two = launch(tiny_run(tiny_data, tmp_path, "two", launch=LaunchConfig("local", workers=2)))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["val/miou_all"] == pytest.approx(one["val/miou_all"], abs=0.5)


def test_the_local_launcher_loads_no_platform():
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['ray', 'deepspeed', 'mlflow']))\n"
        "import memseg_dist.launch\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
