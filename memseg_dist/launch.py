"""`launch(config)` starts a run where its config says, and tells where its results lie."""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memseg_dist.assemble import build_label_space, check_method
from memseg_dist.checks import require
from memseg_dist.config import RunConfig, from_json, to_json, with_absolute_paths
from memseg_dist.data.loader import TrainLoader
from memseg_dist.methods.kinds import register
from memseg_dist.methods.method import MethodConfig
from memseg_dist.nn.weights import fetch_weights
from memseg_dist.platforms import local
from memseg_dist.platforms.folder import FolderTracker
from memseg_dist.tools.external import ensure_indexed
from memseg_dist.train.checkpoint import Checkpoint, DamagedCheckpoint, check_same_run
from memseg_dist.train.console import ConsoleTracker
from memseg_dist.train.engine import EngineFactory, TorchEngine
from memseg_dist.train.lease import holding
from memseg_dist.train.loop import checkpoints_to_resume, train
from memseg_dist.train.overview import survey
from memseg_dist.train.platform import Context, Tracker, Trackers
from memseg_dist.train.storage import make_writable, on_rank_0
from memseg_dist.train.validate import Draw, Validator


def launch(config: RunConfig) -> dict[str, Any]:
    """Trains, resuming what `config.directory` holds. What the training loop returned on rank 0.

    ValueError for a config that cannot run here; RunFailed when training failed.
    """
    config = with_absolute_paths(config)
    wanted = "'hub' or a file, whose statistics backbone.frozen_batchnorm keeps"
    weights, is_frozen = config.backbone.pretrained, config.backbone.frozen_batchnorm
    require(weights or not is_frozen, "backbone.pretrained", weights, wanted)
    fetch_weights(config.backbone.name, config.backbone.pretrained)
    make_writable(config.directory)
    with holding(config.directory):
        check(config)
        config = replace(config, resume="auto")  # asked once: restarted workers do go on
        config_json = to_json(config)
        worker = functools.partial(run_worker, tags=provenance(), method=type(config.method))
        if config.launch.launcher == "ray":
            from memseg_dist.platforms import on_ray

            _announce(config.name, *config.launch.workers_range, "on Ray")
            result = on_ray.run(worker, config_json, config)
        else:
            gpu, timeout_s = config.launch.use_gpu, config.launch.timeout_s
            workers = local.fitting_workers(config.launch.workers_range, gpu)
            _announce(config.name, workers, workers, "on this machine")
            result = local.run(worker, config_json, workers, gpu, timeout_s)
    print(where_things_are(config), flush=True)
    return result


def check(config: RunConfig) -> None:
    """ValueError for what every worker would refuse, before one is started and a tracker opened:
    a run that cannot be resumed, data, classes, the method, its net and their weights.
    """
    register(type(config.method))
    checkpoints = checkpoints_to_resume(config)
    index_data(config)
    label_space = build_label_space(config)
    loader = TrainLoader(
        config.active_sources, label_space, seed=config.seed, cache_dir=config.cache_directory
    )
    for checkpoint in map(Checkpoint, checkpoints):
        with suppress(DamagedCheckpoint):  # the workers warn, and go back to an older one
            checkpoint.verify(["run.json"])
            check_same_run(checkpoint, config, label_space, loader.fingerprints())
            break
    survey(config, torch.device("cpu"), 1, None)
    if config.validation is not None:
        Validator(config, label_space, torch.device("cpu"))
    check_method(config, label_space)


def index_data(config: RunConfig) -> None:
    paths = [source.path for source in config.active_sources]
    ensure_indexed(
        [*paths, config.validation.path] if config.validation else paths, config.cache_directory
    )


def _announce(name: str, least: int, most: int, where: str) -> None:
    """Starting takes a while, without a word from the workers."""
    number = str(most) if least == most else f"{least} to {most}"
    print(f"{name}: starting {number} worker{'s' if most > 1 else ''} {where}", flush=True)


def run_worker(
    config_json: str, context: Context, *, tags: Mapping[str, str], method: type[MethodConfig]
) -> dict[str, Any]:
    """One worker's part of the run. method: may be one that only the job knows."""
    register(method)
    config = from_json(config_json)
    index_data(config)
    overview = on_rank_0(
        lambda: survey(
            config, context.device, context.size, next(iter(checkpoints_to_resume(config)), None)
        )
    )
    tracker = build_tracker(config, tags) if context.rank == 0 else Tracker()
    tracker.begin(overview)
    draw: Draw | None = None
    if context.rank == 0:  # the others need not import what draws
        from memseg_dist.tools.pictures.draw import draw_validation

        draw = draw_validation
    return train(config, context, tracker, engine_factory(config), draw)


def engine_factory(config: RunConfig) -> EngineFactory:
    if config.engine.kind == "torch":
        return TorchEngine
    from memseg_dist.platforms.on_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine


def build_tracker(config: RunConfig, tags: Mapping[str, str]) -> Tracker:
    """What rank 0 writes to; figures to standard output and pictures to the run directory too."""
    trackers: list[Tracker] = [ConsoleTracker(config)]
    if config.tracking.kind == "none":
        return trackers[0]
    trackers.append(FolderTracker(config.directory))
    if config.tracking.kind == "mlflow":
        trackers.append(build_mlflow(config, tags))
    return Trackers(trackers)


def build_mlflow(config: RunConfig, tags: Mapping[str, str]) -> Tracker:
    """The run's MLflow alone: the run that it has already, if there is one."""
    from memseg_dist.platforms.on_mlflow import MlflowTracker

    uri = tracking_uri(config)
    is_ours = config.tracking.uri is None
    return MlflowTracker(
        config.directory,
        uri=uri,
        experiment=config.tracking.experiment,
        run_name=config.name,
        artifacts=Path(config.storage, "mlflow-artifacts").as_uri() if is_ours else None,
        tags=tags,
        history=f"{config.directory}/metrics.jsonl",
        system_metrics=config.tracking.system_metrics,
    )


def tracking_uri(config: RunConfig) -> str:
    if config.tracking.uri is not None:
        return config.tracking.uri
    if "://" in config.storage:
        raise ValueError(
            f"storage {config.storage} is a URL, which cannot hold MLflow's sqlite file; set "
            "tracking.uri (a tracking server, or sqlite:////some/local/mlflow.db)"
        )
    return f"sqlite:///{config.storage}/mlflow.db"


def provenance() -> dict[str, str]:
    """What made this run: the command and the commit of the code."""
    folder = Path(__file__).parent
    return {
        "memseg.command": shlex.join([sys.executable, *sys.argv]),
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.git.commit": _git(folder, "rev-parse", "HEAD") or "unknown",
        "memseg.git.modified": str(bool(_git(folder, "status", "--porcelain", "-uno"))),
    }


def where_things_are(config: RunConfig) -> str:
    lines = [f"run         {config.directory}"]
    if config.validation is not None and config.tracking.kind != "none":
        lines.append(f"overlays    {config.directory}/panels")
    lines.append(f"figures     {config.directory}/metrics.jsonl")
    if config.tracking.kind == "mlflow":
        uri = tracking_uri(config)
        if not uri.startswith("http"):  # a server's page is there already
            lines.append(f"            mlflow ui --backend-store-uri {uri}")
        lines.append(f"            {mlflow_page(config)}")
    if "runtime_resources/working_dir_files" in config.storage:
        lines.append("attention   this directory vanishes with the Ray job; use --storage")
    return "\n".join(lines)


def mlflow_page(config: RunConfig) -> str:
    from memseg_dist.platforms.on_mlflow import run_page

    return run_page(config.directory, tracking_uri(config)) or "(MLflow has no page of this run)"


def _git(folder: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
