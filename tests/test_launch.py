"""What is decided before a worker starts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from platforms.tiny_run import tiny_run
from safetensors.torch import save_file

from memseg_dist.config import LaunchConfig, TrackingConfig
from memseg_dist.launch import launch, provenance, tracking_uri, where_things_are
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


def test_a_refused_command_leaves_a_finished_run_as_it_is(tiny_data, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    config = tiny_run(tiny_data, tmp_path, tracking=TrackingConfig(system_metrics=False))
    launch(config)

    def page():
        client = mlflow.MlflowClient(tracking_uri(config))
        (run,) = client.search_runs(["1"])
        return run.info.status, run.info.end_time, run.data.tags

    before = page()
    monkeypatch.setattr(sys, "argv", ["jobs/another.py"])
    with pytest.raises(ValueError, match=r"another config.*steps: 4 -> 8"):
        launch(replace(config, steps=8))
    assert before[0] == "FINISHED" and page() == before


@pytest.mark.parametrize(
    ("section", "change", "text"),
    [
        ("backbone", {"name": "tset_vit"}, r"no timm model; nearest: .*test_vit"),
        ("backbone", {"pretrained": "other.safetensors"}, "do not fit 'test_vit'"),
        ("validation", {"exclude": ("toy:9",)}, "exclude: 'toy:9' is no class"),
        ("method", {"source_weights": {"photos": 2.0}}, "'photos'; it must be a source"),
    ],
)
def test_a_users_mistake_is_named_before_a_worker_starts(
    tiny_data, tmp_path, monkeypatch, section, change, text
):
    monkeypatch.chdir(tmp_path)
    save_file({"stem.weight": torch.zeros(3)}, "other.safetensors")
    monkeypatch.setattr("memseg_dist.platforms.local.run", lambda *_: pytest.fail("started"))
    config = tiny_run(tiny_data, tmp_path / "runs")
    with pytest.raises(ValueError, match=text):
        launch(replace(config, **{section: replace(getattr(config, section), **change)}))


def test_a_damaged_checkpoint_is_no_obstacle_to_resuming(tiny_data, tmp_path):
    config = tiny_run(tiny_data, tmp_path)
    launch(config)
    newest = Path(config.directory, "checkpoints", "step-00000004", "run.json")
    newest.write_bytes(newest.read_bytes().replace(b"{", b"[", 1))
    assert launch(config)["step"] == 4


def test_a_tracking_servers_page_is_named_without_a_command(tiny_data, tmp_path):
    tracking = TrackingConfig(uri="http://tracking:5000")
    text = where_things_are(tiny_run(tiny_data, tmp_path, tracking=tracking))
    assert "MLflow" in text and "mlflow ui" not in text
    text = where_things_are(tiny_run(tiny_data, tmp_path, tracking=TrackingConfig()))
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in text
