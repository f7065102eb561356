"""Kills a run at random, again and again, and looks at what is left of it.

    make chaos                                # 30 kills: 10 minutes on two quiet cores
    python -m chaos --launchers local --kills 6 --seed 7

Two DeepSpeed workers with loader processes, a memory, evaluation and MLflow, as plain processes and
on Ray. Victims: the driver, a worker, a loader process, the fork server, the whole process group,
at a random step or while the run starts. Once mlflow.db is deleted, once the run is asked to stop.
At the end every weight and every loss must be those of a run that nobody disturbed (of plain
processes, for both), MLflow must have one run with each step once, and no process or temporary file
may be left. Where a whole process group is killed, or a worker before its loader processes live,
nobody is there to clean up: each worker may leave the folder of its fork server's sockets, and
Python's semaphores of 32 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from platforms.tiny_run import draw, tiny_run

from memseg_dist.config import (
    EngineConfig,
    Intervals,
    LaunchConfig,
    LoaderConfig,
    RunConfig,
    TrackingConfig,
    to_json,
)
from memseg_dist.train.checkpoint import Checkpoint, latest

MARK = "MEMSEG_CHAOS"
PATIENCE_S = 600.0
"""How long anything may take: a run that hangs is a failure."""
JOB = Path(__file__).with_name("job.py")
STEPS_PER_KILL = 4
"""More than a run advances between two kills, on average."""
LOSS = "losses/all"
"""MLflow's name of it."""


@dataclass
class Victim:
    """A run that is killed and started again. Its processes are found by a mark in their
    environment, whoever their parent is.
    """

    config: RunConfig
    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    driver: subprocess.Popen[bytes] | None = None
    starts: int = 0
    unattended: int = 0
    """Workers that may have died without anybody there to clean up behind them."""

    def start(self) -> None:
        self.starts += 1
        path = self.folder / f"{self.config.name}.json"
        path.write_text(to_json(self.config))
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        settings = {MARK: self.mark, "TMPDIR": str(temporary), "RAY_TMPDIR": str(self.folder / "r")}
        with open(self.folder / f"{self.config.name}.log", "ab") as output:
            self.driver = subprocess.Popen(
                [sys.executable, JOB, "--config", path],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None

    @property
    def step(self) -> int:
        """The last step that the run has written down."""
        path = Path(self.config.directory, "metrics.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return json.loads(whole[-1])["step"] if whole else 0

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Those that live, by what they are."""
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.setdefault(self._role(process), []).append(process)
            except psutil.Error:  # it is gone, a zombie, or another user's
                continue
        return found

    def _role(self, process: psutil.Process) -> str:
        command = " ".join(process.cmdline())
        if self.driver is not None and process.pid == self.driver.pid:
            return "driver"
        if process.name() == "pt_data_worker":
            return "loader"
        if "forkserver import main" in command:
            return "fork server"
        if "multiprocessing.spawn" in command or "RayTrainWorker" in command:
            return "worker"
        return "other"

    def kill(self, choice: random.Random) -> str:
        """SIGKILL to one of them, or to all. What it was."""
        assert self.driver is not None
        there = self.processes()
        roles = [name for name in sorted(there) if name != "other"]
        role = choice.choice([*roles, "process group"])
        workers = self.config.launch.workers_range[1]
        have_loaders = len(there.get("loader", [])) >= workers  # which clean up behind a worker
        self.unattended += 0 if have_loaders and role != "process group" else workers
        if role == "process group":
            os.killpg(self.driver.pid, signal.SIGKILL)
        elif role in there:
            choice.choice(there[role]).kill()
        return role


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"FAILED: {what} did not happen within {PATIENCE_S:.0f} s")
        time.sleep(0.1)


def await_step(victim: Victim, step: int) -> None:
    wait_until(lambda: victim.step >= step or not victim.is_running, f"step {step}")


def torment(victim: Victim, kills: int, choice: random.Random) -> Counter[str]:
    """Kill the run so many times, and let it end. How often what was killed."""
    killed: Counter[str] = Counter()
    for number in range(kills):
        if not victim.is_running:
            wait_until(lambda: not victim.processes(), "the end of the processes of a killed run")
            if number == kills // 2:
                Path(victim.config.storage, "mlflow.db").unlink(missing_ok=True)
            victim.start()
        if choice.random() < 0.2:
            time.sleep(choice.uniform(0.0, 10.0))  # it may not have come to a step yet
        else:
            await_step(victim, victim.step + choice.randint(1, 5))
        if not victim.is_running:
            assert victim.driver is not None
            code = victim.driver.returncode  # 0: its steps are done
            raise SystemExit(f"FAILED: the run ended by itself ({code}) after {number} kills")
        role = victim.kill(choice)
        killed[role] += 1
        print(f"{victim.config.name}: kill {number + 1}: {role} at step {victim.step}", flush=True)
        if victim.config.launch.launcher == "local" or role in ("driver", "process group"):
            wait_until(lambda: not victim.is_running, "the end of a killed run")
    return killed


def stop(victim: Victim) -> int:
    """Ask the run to stop, as a batch system does: the whole process group, where that is ours."""
    if not victim.is_running:
        victim.start()
    await_step(victim, victim.step + 2)
    assert victim.driver is not None
    if victim.config.launch.launcher == "local":
        os.killpg(victim.driver.pid, signal.SIGTERM)
    else:
        victim.driver.terminate()  # the group has the cluster in it
    wait_until(lambda: not victim.is_running, "the end of a stopped run")
    return victim.driver.returncode


def finish(victim: Victim) -> int:
    if not victim.is_running:
        victim.start()
    assert victim.driver is not None
    wait_until(lambda: not victim.is_running, "the end of the run")
    return victim.driver.returncode


def content(config: RunConfig) -> tuple[dict[str, str], dict[int, float]]:
    """The hashes of the last checkpoint's files, and the loss of every step."""
    path = latest(f"{config.directory}/checkpoints")
    assert path is not None
    files = Checkpoint(path).manifest.files
    lines = map(json.loads, Path(config.directory, "metrics.jsonl").read_text().splitlines())
    hashes = {name: entry.sha256 for name, entry in files.items() if name != "run.json"}
    return hashes, {line["step"]: line["loss"] for line in lines if "loss" in line}


def tracked_steps(storage: str) -> list[list[int]]:
    """Of each of MLflow's runs the steps whose loss it has."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [run.info.run_id for run in client.search_runs(ids)]
    return [sorted(m.step for m in client.get_metric_history(run, LOSS)) for run in runs]


def left_over(folder: Path, storage: str) -> list[str]:
    """Temporary files: in TMPDIR, and unfinished ones where the run wrote."""
    others = [p for p in Path(folder, "tmp").glob("*") if not p.name.startswith("pymp-")]
    mine = [*others, *Path(storage).rglob("*.tmp")]
    torn = [p for p in Path(storage).glob("*/checkpoints/*") if not (p / "manifest.json").exists()]
    return sorted(map(str, [*mine, *torn]))


def sockets(folder: Path) -> int:
    """Folders of sockets in TMPDIR."""
    return len([*Path(folder, "tmp").glob("pymp-*")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launchers", nargs="+", default=["local", "ray"])
    parser.add_argument("--kills", nargs="+", type=int, default=[22, 8], help="of each launcher")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    choice = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: Ray puts sockets there
    draw(folder / "data")
    shared_memory = len(os.listdir("/dev/shm"))
    failures = []

    def victim_of(launcher: str, name: str, steps: int) -> Victim:
        config = tiny_run(
            folder / "data",
            folder / name,
            name,
            launch=LaunchConfig(launcher, workers=2, max_failures=-1),
            engine=EngineConfig("deepspeed", zero_stage=1),
            tracking=TrackingConfig(system_metrics=False),
            loader=LoaderConfig(processes=1),
            steps=steps,
            every=Intervals(log=1, evaluate=25, checkpoint=2, poll=2),
        )
        return Victim(config, folder)

    try:
        for launcher, kills in zip(options.launchers, options.kills, strict=True):
            started = time.monotonic()
            steps = STEPS_PER_KILL * kills + 20
            calm = victim_of("local", f"calm-{launcher}", steps)
            calm_code = finish(calm)
            before = sockets(folder)
            victim = victim_of(launcher, launcher, steps)
            killed = torment(victim, kills, choice)
            stopped, ended = stop(victim), finish(victim)
            deadline = time.monotonic() + 30
            while (alive := {**calm.processes(), **victim.processes()}) and (
                time.monotonic() < deadline
            ):
                time.sleep(0.5)
            hashes, losses = content(victim.config)
            calm_hashes, calm_losses = content(calm.config)
            files = left_over(folder, victim.config.storage)
            folders = sockets(folder) - before
            checks = {
                "exit codes 0, 75, 0": (calm_code, stopped, ended) == (0, os.EX_TEMPFAIL, 0),
                "weights, optimizer, memory bitwise": hashes == calm_hashes,
                "losses bitwise": losses == calm_losses,
                "one MLflow run, each step once": tracked_steps(victim.config.storage)
                == [list(range(1, steps + 1))],
                "no process left": not alive,
                "no temporary file left": not files and folders <= victim.unattended,
            }
            failures += [f"{launcher}: {name}" for name, holds in checks.items() if not holds]
            what = ", ".join(f"{count} {role}" for role, count in sorted(killed.items()))
            rows = [
                "| launcher | kills | starts | steps | processes left | files + sockets | time |",
                "| --- | --- | --- | --- | --- | --- | --- |",
                f"| {launcher} | {killed.total()} ({what}) | {victim.starts} | {steps} | "
                f"{sum(map(len, alive.values()))} | {len(files)} + {folders} | "
                f"{time.monotonic() - started:.0f} s |",
            ]
            rows += [f"  {'yes' if holds else 'NO '} {name}" for name, holds in checks.items()]
            print(*rows, sep="\n", flush=True)
            if files or alive:
                print(files[:20], alive, flush=True)
        print(f"entries of /dev/shm: {shared_memory} before, {len(os.listdir('/dev/shm'))} after")
    except BaseException:
        print(f"logs and runs: {folder}", flush=True)
        raise
    if failures:
        raise SystemExit(f"FAILED: {failures}; logs and runs: {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
