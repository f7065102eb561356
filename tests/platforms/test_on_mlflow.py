"""MLflow: one run whatever happens, nothing twice, and training never waits nor stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

mlflow = pytest.importorskip("mlflow")

from memseg_dist.platforms import on_mlflow  # noqa: E402
from memseg_dist.platforms.on_mlflow import MlflowTracker  # noqa: E402
from memseg_dist.train.overview import DataSet, Overview  # noqa: E402


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A database that is made once: creating its tables takes a second or two."""
    folder = tmp_path_factory.mktemp("mlflow")
    return f"sqlite:///{folder}/mlflow.db", folder


def open_tracker(store, directory, **changes) -> MlflowTracker:
    uri, folder = store
    settings = {
        "uri": uri,
        "experiment": "tests",
        "run_name": directory.name,
        "artifacts": (folder / "artifacts").as_uri(),
        "system_metrics": False,
    }
    return MlflowTracker(str(directory), **(settings | changes))


TELEMETRY = """
import sys
from memseg_dist.platforms.on_mlflow import MlflowTracker
MlflowTracker(sys.argv[1], uri=f"sqlite:///{sys.argv[1]}/db", experiment="e", run_name="r",
              system_metrics=False)
from mlflow.telemetry import get_telemetry_client
print(get_telemetry_client())
"""


def test_telemetry_is_off(tmp_path):
    quiet = ("CI", "PYTEST", "DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "GITHUB")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(quiet)}
    command = [sys.executable, "-c", TELEMETRY, str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "None"


def read(store, tracker):
    client = mlflow.MlflowClient(tracking_uri=store[0])
    return client, client.get_run(tracker.run_id)


def test_everything_arrives(store, tmp_path):
    tracker = open_tracker(store, tmp_path, tags={"mlflow.source.git.commit": "abc123"})
    many = {f"group.{index}": str(index) for index in range(250)}
    tracker.log_params({**many, "long": "x" * 9000, "odd(key)": "y", "usual": "z"}, {"usual"})
    for step in range(2500):
        tracker.log_metrics({"loss/masks/seg": step / 10, "lr": 0.1}, step)
    tracker.log_metrics({"val/miou_novel": float("nan")}, 2500)
    tracker.log_image("panels/00", np.zeros((8, 8, 3), np.uint8), 7)
    tracker.log_text("val/table.csv", "class,iou\n")
    tracker.finish("finished")

    assert (tracker.num_failures, tracker.num_dropped) == (0, 0)
    client, run = read(store, tracker)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.source.git.commit"] == "abc123"
    assert len(run.data.params) == 252
    assert (run.data.params["odd_key_"], len(run.data.params["long"])) == ("y", 200)
    history = client.get_metric_history(run.info.run_id, "losses/masks seg")
    assert [(metric.step, metric.value) for metric in history] == [
        (step, step / 10) for step in range(2500)
    ]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
        "note",
        "panels",
        "val",
    }
    assert [
        item.path for item in client.list_artifacts(run.info.run_id, "panels/step-00000007")
    ] == ["panels/step-00000007/00.png"]


def test_a_run_says_what_it_is_and_what_came_of_it(store, tmp_path):
    row = DataSet("masks", "/data/masks", "masks", 400, 24, 20, "2 x 8 images", "96 x 96", "abc")
    overview = Overview("tiny: larvseg", (row,), {"starts": "at step 0"}, ("no trees",))
    for status in ("stopped", "finished"):  # a restart says it again
        tracker = open_tracker(store, tmp_path, tags={"memseg.command": "python jobs/tiny.py"})
        tracker.begin(overview)
        tracker.log_image("panels/00", np.zeros((8, 8, 3), np.uint8), 7)
        tracker.log_metrics({"val/miou_all": 42.0}, 7)
        tracker.finish(status)
    tracker = open_tracker(store, tmp_path, tags={"memseg.command": "python jobs/tiny.py"})
    tracker.begin(overview)
    tracker.finish("finished")  # which has drawn nothing, as it was done already
    _, run = read(store, tracker)
    assert tracker.num_failures == 0
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**finished** mIoU all 42.00\n\ntiny: larvseg\n")
    assert "**masks** (masks): 400 images" in note and "no trees" in note
    assert "`python jobs/tiny.py`" in note and note.count("?path=note/panels/00.png&") == 1
    (found,) = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("masks", "abc")
    assert json.loads(found.dataset.profile)["num_images"] == 400
    page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?"
    assert page in on_mlflow.run_page(str(tmp_path), store[0])


def test_figures_are_grouped_by_what_they_are():
    names = {
        "lr": "optimizer/lr",
        "loss": "losses/all",
        "loss/masks/seg": "losses/masks seg",
        "val/miou_novel": "scores/mIoU novel",
        "images_per_second": "speed/images per second",
        "memory/fill": "memory/fill",
        "teacher/decay": "teacher/decay",
    }
    assert {name: on_mlflow._metric(name) for name in names} == names


def test_a_restart_continues_the_run_and_writes_nothing_twice(store, tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    first = open_tracker(store, tmp_path)
    first.log_params({"launch.workers": "2", "seed": "0"})
    for step in (1, 2, 3, 4):
        first.log_metrics({"loss": float(step)}, step)
    first.log_image("panels/00", image, 2)
    first.finish("failed")

    second = open_tracker(store, tmp_path)  # resumes from the checkpoint of step 2
    second.log_params({"launch.workers": "3", "seed": "0"})
    for step in (3, 4, 5):
        second.log_metrics({"loss": float(step), "late": 0.0}, step)
    for step in (2, 5):
        second.log_image("panels/00", image, step)
    second.finish("finished")

    assert second.run_id == first.run_id
    assert (second.num_failures, second.num_dropped) == (0, 0)
    client, run = read(store, second)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "losses/all")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5]
    late = client.get_metric_history(run.info.run_id, "late/late")
    assert [metric.step for metric in late] == [3, 4, 5]
    assert run.data.params["launch.workers"] == "2"
    assert run.data.tags["resumed.launch.workers"] == "2 -> 3"
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "panels")]
    assert pictures == ["panels/step-00000002", "panels/step-00000005"]
    with open(tmp_path / on_mlflow.RUN_FILE) as file:
        assert json.load(file)["run_id"] == run.info.run_id


def test_figures_that_a_killed_process_never_wrote_come_from_the_history(store, tmp_path):
    rows = [{"step": step, "loss": step / 2, "val/miou_all": 1.0} for step in (1, 2, 3)]
    lines = [json.dumps(row) + "\n" for row in rows]
    history = tmp_path / "metrics.jsonl"
    history.write_text(lines[0])
    first = open_tracker(store, tmp_path, history=str(history))
    first.log_metrics({"loss": 1.0}, 2)
    first.finish("failed")
    history.write_text("".join(lines) + '{"step": 4, "lo')
    second = open_tracker(store, tmp_path, history=str(history))
    second.log_metrics({"loss": 2.0}, 4)
    second.finish("finished")
    client, run = read(store, second)
    written = client.get_metric_history(run.info.run_id, "losses/all")
    expected = [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert sorted((metric.step, metric.value) for metric in written) == expected


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_run_that_the_store_lost_is_made_anew_from_the_history(
    store, tmp_path, capsys, is_deleted
):
    first = open_tracker(store, tmp_path)
    first.finish("stopped")
    if is_deleted:
        mlflow.MlflowClient(tracking_uri=store[0]).delete_run(first.run_id)
    else:  # as after the loss of mlflow.db
        entry = {"run_id": "f" * 32, "tracking_uri": store[0]}
        (tmp_path / on_mlflow.RUN_FILE).write_text(json.dumps(entry))
    history = tmp_path / "metrics.jsonl"
    history.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    second = open_tracker(store, tmp_path, history=str(history))
    second.log_params({"seed": "3"})
    second.log_metrics({"loss": 0.125}, 3)
    second.finish("finished")
    assert (second.num_failures, second.num_dropped) == (0, 0)
    assert "no longer has the run" in capsys.readouterr().out
    client, run = read(store, second)
    assert run.info.run_id not in (first.run_id, "f" * 32)
    assert run.data.params == {"seed": "3"}
    written = client.get_metric_history(run.info.run_id, "losses/all")
    found = sorted((metric.step, metric.value) for metric in written)
    assert found == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert json.loads((tmp_path / on_mlflow.RUN_FILE).read_text())["run_id"] == run.info.run_id


def test_system_metrics_are_written(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    tracker = open_tracker(store, tmp_path, system_metrics=True)
    deadline = time.monotonic() + 20
    while tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    tracker.finish("stopped")
    _, run = read(store, tracker)
    assert run.info.status == "KILLED"
    assert "system/cpu_utilization_percentage" in run.data.metrics


def test_a_store_that_cannot_be_opened_stops_nothing(store, tmp_path, capsys):
    (tmp_path / "a-file").touch()
    tracker = open_tracker(store, tmp_path, uri=f"sqlite:///{tmp_path}/a-file/mlflow.db")
    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step)
    start = time.monotonic()
    tracker.finish("finished")
    assert time.monotonic() - start < 30
    assert tracker.run_id is None and tracker.num_failures >= 1 and tracker.num_dropped >= 1
    output = capsys.readouterr().out
    assert "training goes on" in output
    assert "entries were dropped; training was not affected" in output


def test_a_store_that_fails_for_a_while_loses_nothing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(on_mlflow, "PAUSE_S", 0.05)
    tracker = open_tracker(store, tmp_path)
    while tracker.run_id is None:
        time.sleep(0.05)
    write, outages = tracker._client.log_batch, iter([OSError("gone"), OSError("gone")])

    def log_batch(*args, **kwargs):
        for error in outages:
            raise error
        return write(*args, **kwargs)

    monkeypatch.setattr(tracker._client, "log_batch", log_batch)
    tracker.log_metrics({"loss": 1.0}, 1)
    time.sleep(0.5)
    tracker.log_metrics({"loss": 2.0}, 2)
    tracker.finish("finished")
    assert (tracker.num_failures, tracker.num_dropped) == (2, 0)
    client, run = read(store, tracker)
    history = client.get_metric_history(run.info.run_id, "losses/all")
    assert [metric.step for metric in history] == [1, 2]


def test_a_slow_store_bounds_memory_and_never_blocks(store, tmp_path, monkeypatch):
    monkeypatch.setattr(on_mlflow, "MAX_PENDING", 50)
    tracker = open_tracker(store, tmp_path)
    tracker._put(lambda: time.sleep(1.0))
    start = time.monotonic()
    for step in range(500):
        tracker.log_text(f"{step}.txt", "x")
    assert time.monotonic() - start < 0.5
    tracker.finish("finished")
    assert 0 < tracker.num_dropped < 500


@pytest.mark.parametrize("content", ["", '{"run_id": "a', "[]"])
def test_a_half_written_file_of_the_run_is_no_obstacle(store, tmp_path, content):
    (tmp_path / on_mlflow.RUN_FILE).write_text(content)
    assert on_mlflow.run_page(str(tmp_path), store[0]) is None
    tracker = open_tracker(store, tmp_path)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish("finished")
    assert tracker.num_dropped == tracker.num_failures == 0
    assert on_mlflow.run_page(str(tmp_path), store[0]) is not None


def test_a_part_that_fails_does_not_keep_the_figures_from_arriving(store, tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no such sensor")

    monkeypatch.setattr(on_mlflow, "PAUSE_S", 0.0)
    monkeypatch.setattr(MlflowTracker, "_monitor_system", fail)
    tracker = open_tracker(store, tmp_path)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish("finished")
    run = mlflow.MlflowClient(store[0]).get_run(tracker.run_id)
    assert run.data.metrics == {"losses/all": 1.0} and tracker.num_dropped == 0
