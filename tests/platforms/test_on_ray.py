"""A real Ray cluster on this machine: DeepSpeed workers, a killed worker, a readable error."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from platforms.tiny_run import tiny_run

from memseg_dist.config import EngineConfig, LaunchConfig, TrackingConfig, to_json
from memseg_dist.launch import launch, run_worker
from memseg_dist.methods.larvseg.config import LarvSegConfig

ray = pytest.importorskip("ray")

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_driver_prints_workers_lines_as_they_wrote_them(capsys):
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    from memseg_dist.platforms.on_ray import _readable_output

    noise = "core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID: 'bf' has"
    no_dashboard = "Failed to query Ray Train Controller actor state. State API may be temporarily"
    data = {"pid": 7, "ip": "here", "localhost": "here", "actor_name": "RayTrainWorker"}
    dispatcher.add_handler("ray_print_logs", lambda data: print("as Ray prints it"))
    try:
        with _readable_output():
            dispatcher.emit(
                {**data, "is_err": False, "lines": ["step 1/4  25%", noise, no_dashboard]}
            )
            dispatcher.emit({**data, "is_err": True, "lines": [noise, "worker 1: no such file"]})
    finally:
        dispatcher.remove_handler("ray_print_logs")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("step 1/4  25%\n", "worker 1: no such file\n")


def test_a_later_stage_that_needs_more_gets_a_larger_cluster(tmp_path, tiny_data):
    from memseg_dist.platforms.on_ray import connect

    small = tiny_run(tiny_data, tmp_path, launch=LaunchConfig(workers=1))
    large = dataclasses.replace(
        small, launch=LaunchConfig(workers=2, cpus_per_worker=os.cpu_count())
    )
    assert not ray.is_initialized()
    try:
        connect(small)
        connect(large)
        assert ray.cluster_resources()["CPU"] == 2 * os.cpu_count()
        before = ray.get_runtime_context().gcs_address
        connect(small)  # which is large enough
        assert ray.get_runtime_context().gcs_address == before
    finally:
        ray.shutdown()


def history(config) -> list[dict]:
    text = Path(config.directory, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(config) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in history(config) if "loss" in row}


def only_run(storage: Path):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("memseg-dist")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_two_deepspeed_workers_train_to_the_end(cluster, tiny_data, tmp_path):
    config = tiny_run(
        tiny_data,
        tmp_path,
        launch=LaunchConfig("ray", workers=2),
        engine=EngineConfig("deepspeed", zero_stage=1),
        tracking=TrackingConfig(),
    )
    result = launch(config)
    assert (result["status"], result["step"]) == ("finished", 4)
    assert "val/miou_all" in result

    alone = tiny_run(tiny_data, tmp_path, "alone")
    launch(alone)
    assert losses(config) == pytest.approx(losses(alone), rel=1e-4)

    client, run = only_run(tmp_path)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert run.data.params["launch.workers"] == "2"
    assert run.data.metrics["scores/mIoU all"] == pytest.approx(result["val/miou_all"])
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "panels", "validation"} <= names
    assert list(Path(config.directory, "panels").rglob("*.png"))


def test_a_killed_worker_is_replaced_and_nothing_is_lost(cluster, tiny_data, tmp_path):
    from memseg_dist.platforms import on_ray

    config = tiny_run(
        tiny_data,
        tmp_path,
        launch=LaunchConfig("ray", workers=2, max_failures=1),
        tracking=TrackingConfig(),
        steps=12,
    )
    flag, rows = tmp_path / "killed", Path(config.directory, "metrics.jsonl")

    def worker(config_json, context):
        import os
        import signal
        import threading
        import time

        from memseg_dist.launch import run_worker

        def kill_myself():
            while not rows.exists() or rows.read_text().count("\n") < 5:
                time.sleep(0.01)
            flag.write_text(str(context.rank))
            os.kill(os.getpid(), signal.SIGKILL)

        if context.rank == 1 and not flag.exists():
            threading.Thread(target=kill_myself, daemon=True).start()
        return run_worker(config_json, context, tags={}, method=type(config.method))

    result = on_ray.run(worker, to_json(config), config)
    assert flag.read_text() == "1"
    assert (result["status"], result["step"]) == ("finished", 12)
    client, run = only_run(tmp_path)
    written = client.get_metric_history(run.info.run_id, "losses/all")
    assert [metric.step for metric in written] == list(range(1, 13))
    undisturbed = tiny_run(tiny_data, tmp_path, "undisturbed", steps=12)
    launch(undisturbed)
    assert sorted(losses(config)) == list(range(1, 13))
    assert losses(config) == pytest.approx(losses(undisturbed), rel=1e-4)


@pytest.mark.slow
def test_a_worker_that_dies_as_its_work_arrives_is_replaced(
    cluster, tiny_data, tmp_path, capsys, monkeypatch
):
    """What Ray Train takes for a failure of its controller, and gives up."""
    from memseg_dist.platforms import on_ray

    def arrive(function, times):
        for number in range(times):
            try:
                (tmp_path / f"died-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os._exit(1)
        return function

    class Arriving:
        """A function, of which the first workers die that unpickle it."""

        def __init__(self, function, times):
            self.sent = function, times

        def __reduce__(self):
            return arrive, self.sent

        def __call__(self):
            raise AssertionError("only what it becomes is called")

    def run(name, max_failures, times):
        launch = LaunchConfig("ray", workers=1, max_failures=max_failures)
        config = tiny_run(tiny_data, tmp_path, name, launch=launch)
        monkeypatch.setattr(
            on_ray, "_fit", lambda loop, config, gpu: fit(Arriving(loop, times), config, gpu)
        )
        return on_ray.run(worker, to_json(config), config)

    fit, worker = on_ray._fit, functools.partial(run_worker, tags={}, method=LarvSegConfig)
    assert run("twice", 2, 2)["status"] == "finished"
    assert capsys.readouterr().out.count("starting it again") == 2
    with pytest.raises(RuntimeError, match=r"^a worker died .* while its group was started$"):
        run("once too often", 0, 3)
    assert not on_ray._reserved()
    assert run("after it", 0, 0)["status"] == "finished"


@pytest.mark.slow
def test_a_workers_error_comes_back_as_one_readable_message(cluster, tiny_data, tmp_path):
    from memseg_dist.platforms import on_ray

    config = tiny_run(tiny_data, tmp_path, launch=LaunchConfig("ray", workers=2, max_failures=0))
    missing = dataclasses.replace(config.sources[0], path=str(tmp_path / "not-there"))
    config = dataclasses.replace(config, sources=(missing, config.sources[1]))
    worker = functools.partial(run_worker, tags={}, method=type(config.method))
    with pytest.raises(RuntimeError) as caught:  # `launch` would not start a worker
        on_ray.run(worker, to_json(config), config)
    assert "not-there" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 20


@pytest.mark.slow
def test_a_job_is_submitted_from_the_working_directory(tmp_path):
    """What the README says, with the token that Ray 2.60 asks for."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "f" * 64,
    }
    environment.pop("RAY_ADDRESS", None)
    # its own folder: otherwise it would be "the current cluster" of every other Ray user here
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ports = [free_port() for _ in range(4)]
    head = subprocess.Popen(
        [
            *(scripts / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={ports[0]}"),
            *(f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"),
            *(f"--dashboard-agent-listen-port={ports[3]}", f"--temp-dir={folder}"),
        ],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{ports[1]}"
    submit = [str(scripts / "ray"), "job", "submit", "--address", address, "--working-dir", "."]
    command = ["python", "jobs/pretrain_scenes.py", "--smoke", "--storage", str(tmp_path)]
    try:
        wait_for_port(ports[1])
        for _ in range(10):
            done = subprocess.run(
                [*submit, "--", *command],
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                timeout=400,
            )
            if "No available agent" not in done.stderr:
                break  # the head answers before it can start a job
            time.sleep(2)
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "run finished" in done.stdout
    assert list(tmp_path.glob("*/checkpoints/step-00000004/manifest.json"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on port {port}"
            time.sleep(0.5)
