"""Workers on a Ray cluster: Ray Train V2 starts them, watches them and restarts them.

    result = run(worker, config_json, config)

The cluster is the one that `launch.address` or RAY_ADDRESS names (`ray job submit` sets it), else
one is started on this machine, without a dashboard (eleven more processes). A group that fails
starts again, with as many workers as `launch.workers` allows and the cluster has, from the run's
own newest checkpoint; Ray keeps no copy of it.
"""

from __future__ import annotations

import _thread
import functools
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray import PlacementGroupID, cloudpickle
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.worker import print_to_stdstream
from ray.exceptions import RayActorError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.train.torch import TorchConfig, get_device
from ray.train.v2._internal import constants
from ray.train.v2.api import config as ray_config
from ray.train.v2.api.exceptions import (
    ControllerError,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from memseg_dist import dist
from memseg_dist.config import LaunchConfig, RunConfig
from memseg_dist.data.loader_process import delete_temporary_folder
from memseg_dist.platforms import process
from memseg_dist.platforms.process import Failure, RunFailed, WorkerError
from memseg_dist.platforms.ray_init import init_ray
from memseg_dist.train.console import StepBar
from memseg_dist.train.platform import Context

Worker = Callable[[str, Context], dict[str, Any]]

PACKAGE = Path(__file__).resolve().parents[1]
TEARDOWN_S = 600.0
"""How long a worker that was told to leave waits for Ray to take it down."""

_cpus_started: int | None = None
"""Of the cluster that this process has started for its runs; None: it uses another one."""
_DIED = "died (killed, its machine lost, or out of memory)"
_NO_FAILURE = re.compile(
    "Actor with class name: 'PreemptionWatcher'|Failed to query Ray Train Controller actor state"
)
"""Errors that Ray logs of itself in every run that goes well, or that has no dashboard to ask."""


class RayContext:
    """A worker's view of its Ray Train group. stop_key: what the driver puts into the cluster's
    key-value store to ask for a stop.
    """

    def __init__(self, stop_key: str) -> None:
        self._stop_key = stop_key
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = get_device()
        self.preempted = self.asked_to_stop = False

    def report(self, metrics: Mapping[str, float], checkpoint: str | None = None) -> None:
        """Ray sees the figures and where the checkpoint lies; it uploads nothing."""
        entry = {} if checkpoint is None else {"checkpoint_path": checkpoint}
        ray.train.report({**metrics, **entry})

    def should_stop(self) -> bool:
        self.preempted = ray.train.get_preemption_info() is not None
        is_asked = self.rank == 0 and _internal_kv_get(self._stop_key) is not None
        self.asked_to_stop = bool(dist.all_reduce_sum(torch.tensor(int(is_asked))) > 0)
        return self.preempted or self.asked_to_stop


def run(worker: Worker, config_json: str, config: RunConfig) -> dict:
    """worker(config_json, context) on every worker of the group; what rank 0 returned.

    RunFailed when the group failed for good, with the text of the worker's error that caused it.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a report waits for the last
    connect(config)
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    gpu = has_gpus if config.launch.use_gpu is None else config.launch.use_gpu
    stop_key = f"memseg-stop-{uuid.uuid4().hex}"
    _warn_if_small(config, config.launch.workers_range[0], gpu)

    def ask_to_stop() -> None:
        """From another thread: the main one may hold what a call to the cluster needs, or what
        `threading.Thread` does."""
        _thread.start_new_thread(_internal_kv_put, (stop_key, b"1"))

    work = cloudpickle.dumps(functools.partial(_run_worker, worker, config_json, gpu, stop_key))
    try:
        with (
            _helpers_find_this_cluster(),
            _readable_output(),
            process.heeding_stop_signals(ask_to_stop),
        ):
            # what imports this package is unpickled late: Ray watches a worker by then
            return json.loads(_fit(lambda: cloudpickle.loads(work)(), config, gpu).return_value)
    except (TrainingFailedError, RayActorError) as error:
        raise RunFailed(_text_of(error)) from None
    finally:
        with suppress(Exception):  # a cluster that is gone must not hide how the run ended
            _internal_kv_del(stop_key)


def _fit(loop: Callable[[], str], config: RunConfig, gpu: bool) -> Any:
    """What Ray Train returns. It starts a group that fails again, but not one of which a worker
    dies as its work is sent to it, whose resources it keeps as well: that is done here. Ray counts
    the restarts of its own anew then, with one less to go.
    """
    left = config.launch.max_failures
    while True:
        before = _reserved()
        try:
            return _in_a_thread(_trainer(loop, config, gpu, left).fit)
        except ControllerError as error:
            if left == 0 or not isinstance(error.controller_failure, RayActorError):
                raise
            left = max(left - 1, -1)
            print("a worker died while its group was started; starting it again", flush=True)
        finally:
            with suppress(Exception):  # as above
                for group in _reserved() - before:
                    remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def _reserved() -> set[str]:
    """The placement groups of this job: their ids end with its own."""
    job, groups = ray.get_runtime_context().get_job_id(), placement_group_table()
    return {id for id, group in groups.items() if id.endswith(job) and group["state"] != "REMOVED"}


def _in_a_thread(work: Callable[[], Any]) -> Any:
    """work(), which in the main thread would take Ctrl-C for an abort."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the main thread raises it
            outcome.set_exception(error)

    threading.Thread(target=run, name="trainer", daemon=True).start()
    return outcome.result()


def _trainer(loop: Callable[[], str], config: RunConfig, gpu: bool, failures: int) -> TorchTrainer:
    """failures: how many it survives; -1: any number."""
    low, high = config.launch.workers_range
    return TorchTrainer(
        loop,
        torch_config=TorchConfig(
            backend=process.backend(gpu), timeout_s=math.ceil(config.launch.timeout_s)
        ),
        scaling_config=ray_config.ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=gpu,
            resources_per_worker=_resources(config, gpu),
        ),
        run_config=ray_config.RunConfig(
            name="ray",
            storage_path=config.directory,
            failure_config=ray_config.FailureConfig(max_failures=failures),
            worker_runtime_env={"env_vars": _environment(config.launch)},
            logging_config=ray_config.LoggingConfig(log_level="WARNING"),
        ),
    )


@contextmanager
def _helpers_find_this_cluster() -> Iterator[None]:
    """Names the cluster to Ray Train's helper actors, which look for one by themselves.

    Where several clusters run on a machine they find none, or another, and wait for minutes.
    """
    constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


@contextmanager
def _readable_output() -> Iterator[None]:
    """Prints the workers' lines as they wrote them, without what only reads like a failure; a bar
    below them on a terminal.
    """
    bar = StepBar()

    def show(data: dict[str, Any]) -> None:
        lines = [line for line in data["lines"] if not _NO_FAILURE.search(line)]
        print_to_stdstream({**data, "lines": lines}, ignore_prefix=True)
        for line in lines:
            bar.see(line)

    handlers = global_worker_stdstream_dispatcher.handlers
    if "ray_print_logs" in dict(handlers):
        global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
        global_worker_stdstream_dispatcher.add_handler("ray_print_logs", show)
    try:
        yield
    finally:
        bar.close()


def connect(config: RunConfig) -> None:
    """Joins the named cluster, or starts one here that is large enough for the run.

    One that an earlier run of this process has started, and that is too small for this one, makes
    way for another.
    """
    global _cpus_started
    wanted = config.launch.workers_range[1] * _cpus(config)
    if ray.is_initialized():
        if _cpus_started is None or _cpus_started >= wanted:
            return
        ray.shutdown()
    _cpus_started = None
    address = config.launch.address or os.environ.get("RAY_ADDRESS")
    heeded = signal.getsignal(signal.SIGTERM)
    if address is None:
        _cpus_started = max(os.cpu_count() or 1, wanted)
        init_ray(address="local", num_cpus=_cpus_started, include_dashboard=False)
    else:
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        # a job brings its working directory; otherwise other machines get this very package
        init_ray(address=address, runtime_env=None if in_job else {"py_modules": [str(PACKAGE)]})
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, heeded)  # Ray exits with 15 on it


def _run_worker(worker: Worker, config_json: str, gpu: bool, stop_key: str) -> str:
    """The loop of one Ray worker: what rank 0 returned, as JSON."""
    context = RayContext(stop_key)
    ray_context = ray.train.get_context()
    process.set_environment(
        context.rank,
        context.size,
        ray_context.get_local_rank(),
        ray_context.get_local_world_size(),
        gpu,
    )
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # it logs each traceback in full,
    logging.getLogger().setLevel(logging.WARNING)  # and every report
    try:
        result = worker(config_json, context)
    except Exception as error:  # noqa: BLE001 - any error is to reach the driver in short
        failure = Failure.of(error)
        print(f"worker {context.rank}: {failure.text}", file=sys.stderr, flush=True)
        raise WorkerError(failure.text, failure.details) from None
    finally:
        delete_temporary_folder()  # Ray ends this process at once
    if context.preempted and not context.asked_to_stop:
        _await_teardown()
    return json.dumps(result)


def _await_teardown() -> None:
    """Returning would tell Ray that the run is complete; a preempted one is to be started again."""
    deadline = time.monotonic() + TEARDOWN_S
    while time.monotonic() < deadline:
        time.sleep(1)
    raise RuntimeError(
        f"this worker was told that its machine is about to go, saved a checkpoint, and is still "
        f"here {TEARDOWN_S:.0f} s later"
    )


def _environment(launch: LaunchConfig) -> dict[str, str]:
    """Workers import this package whether it is installed or lies in the working directory."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(launch.cpus_per_worker),
    }


def _cpus(config: RunConfig) -> int:
    """Of one worker: its own and its loader's."""
    return config.launch.cpus_per_worker + config.loader.processes


def _resources(config: RunConfig, gpu: bool) -> dict[str, float]:
    return {"CPU": _cpus(config), **({"GPU": 1} if gpu else {})}


def _warn_if_small(config: RunConfig, workers: int, gpu: bool) -> None:
    have, wanted = ray.cluster_resources(), _resources(config, gpu)
    room = {name: math.floor(have.get(name, 0) / amount) for name, amount in wanted.items()}
    kind = min(room, key=room.__getitem__)
    if room[kind] < workers:
        print(
            f"the cluster has room for {room[kind]} of {workers} workers "
            f"({have.get(kind, 0):g} {kind}s, {wanted[kind]:g} for each); waiting for it to grow. "
            "A worker takes launch.cpus_per_worker and loader.processes CPUs",
            flush=True,
        )


def _text_of(error: TrainingFailedError | RayActorError) -> str:
    if isinstance(error, RayActorError):
        return f"Ray Train's controller {_DIED}"
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError):
        return f"a worker {_DIED} while its group was started"
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return str(error)
    return process.summary_of(
        {rank: _failure_of(failure) for rank, failure in error.worker_failures.items()}
    )


def _failure_of(error: Exception) -> Failure:
    kind = type(error).__name__
    if kind == "UserExceptionWithTraceback":
        text = str(error).strip()
        last = text.splitlines()[-1] if text else kind
        return Failure(last, text)
    if kind == "WorkerHealthCheckFailedError":
        return Failure(_DIED, died=True)
    return Failure.of(error)
