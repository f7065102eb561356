"""MLflow: one run per training run, written by rank 0 from a thread of its own.

The run's id lies in the training run's storage (`mlflow_run.json`) and is taken up after a restart.
Steps that a restart repeats are not written twice. Training never waits for the tracking server nor
stops for it: what could not be written is counted, and reported at the end.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from memseg_dist.data.files import exists, read_bytes
from memseg_dist.train.overview import Overview
from memseg_dist.train.platform import Tracker, picture_path
from memseg_dist.train.storage import read_json, replace_file
from memseg_dist.train.validate import EVALUATION

RUN_FILE = "mlflow_run.json"
MAX_PENDING = 10_000
"""Entries that wait to be written; further ones are dropped and counted."""
MAX_METRICS, MAX_PARAMS, MAX_KEY = 1000, 100, 250
"""MLflow's limits: per call, and in characters."""
MAX_VALUE = 200
"""Characters of a parameter's value: a page shows them all. config.json has the whole."""
ATTEMPTS, PAUSE_S = 3, 5.0
MAX_NOTE = 8000
"""Characters of a run's note, MLflow's limit of a tag."""
NOTE_WIDTH = 1000
"""Pixels: MLflow cuts off what is wider than its page."""
FINISH_S = 60.0
"""How long `finish` waits for what is pending."""

Row = tuple[str, float, int, int]
"""Key, value, time in ms, step."""

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_BAD_CHARACTERS = re.compile(r"[^\w\-. /:]")
_PICTURE = re.compile(r"^(.+), step (\d+)\n\n!\[\]", re.MULTILINE)
"""A picture in a run's note."""
_GROUPS = {
    **dict.fromkeys(("images_per_second", "step_seconds", "data_wait_share"), "speed"),
    **dict.fromkeys(("lr", "grad_norm"), "optimizer"),
    "skipped_samples": "speed",
    "loss": "losses",
    "val": "scores",
    "label": "pseudo labels",
}
"""Heading of a figure's chart by the first part of its name; by default that part itself."""


class MlflowTracker(Tracker):
    """See `train.platform.Tracker`.

    directory: the training run's storage, a directory or fsspec URL. uri: MLflow tracking URI.
    artifacts: where a new experiment keeps its files; None leaves it to the server.
    tags: written once the run is open (git commit, ...). history: file of the run's figures, JSON
    lines with "step"; what a killed process had not written yet is taken from it.
    """

    def __init__(
        self,
        directory: str,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        artifacts: str | None = None,
        tags: Mapping[str, str] | None = None,
        history: str | None = None,
        system_metrics: bool = True,
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow  # here, not in the thread: another one may be importing it

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._mlflow = mlflow
        self._uri, self._experiment, self._run_name = uri, experiment, run_name
        self._run_file = f"{directory.rstrip('/')}/{RUN_FILE}"
        self._artifacts, self._tags = artifacts, dict(tags or {})
        self._history, self._wants_system_metrics = history, system_metrics
        self._monitor: Any = None
        self._overview: Overview | None = None
        self._client: Any = None
        self._written: dict[str, int] = {}
        self._pictures: dict[str, int] = {}  # the step of the newest of each name
        self._pending: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_PENDING)
        self._metrics: list[Row] = []
        self._flush_waits = False
        self._lock = threading.Lock()
        self._hurry = threading.Event()
        self.run_id: str | None = None
        self.num_failures = 0
        self.num_dropped = 0
        self.last_error = ""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    # called by the training loop

    def begin(self, overview: Overview) -> None:
        self._put(lambda: self._write_overview(overview))

    def log_params(self, params: Mapping[str, str], defaults: Collection[str] = ()) -> None:
        self._put(lambda: self._write_params(params, defaults))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        rows = [(_metric(name), float(value), now, step) for name, value in metrics.items()]
        with self._lock:
            self._metrics += rows
            excess = len(self._metrics) - MAX_PENDING
            if excess > 0:
                del self._metrics[:excess]
                self.num_dropped += excess
            is_waiting, self._flush_waits = self._flush_waits, True
        if not is_waiting:
            self._put(self._flush)
        if any(name.startswith(EVALUATION) for name in metrics):
            self._put(lambda: self._write_note("running"))

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        """A plain artifact, and the newest of each name a small copy in the run's note. MLflow's
        own tiles for images print all parameters above the picture, which nobody sees then.
        """

        def write() -> None:
            self._client.log_image(self.run_id, image, picture_path(name, step))
            small = Image.fromarray(image)
            small.thumbnail((NOTE_WIDTH, 10 * NOTE_WIDTH))
            self._client.log_image(self.run_id, small, f"note/{name}.png")
            self._pictures[name] = step

        self._put(write)

    def log_text(self, name: str, text: str) -> None:
        self._put(lambda: self._client.log_text(self.run_id, text, name))

    def finish(self, status: str) -> None:
        self._put(self._flush)
        self._put(lambda: self._close(status))
        self._hurry.set()
        try:
            self._pending.put(None, timeout=FINISH_S)
            self._thread.join(FINISH_S)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self.num_dropped += self._pending.qsize()
            self.last_error = self.last_error or f"no answer from {self._uri}"
        if self.num_failures or self.num_dropped:
            print(
                f"tracking: {self.num_failures} calls to {self._uri} failed and "
                f"{self.num_dropped} entries were dropped; training was not affected. "
                f"Last error: {self.last_error}",
                flush=True,
            )

    # in the thread

    def _put(self, call: Callable[[], None]) -> None:
        try:
            self._pending.put_nowait(call)
        except queue.Full:
            self.num_dropped += 1

    def _work(self) -> None:
        if self._repeat(self._open, attempts=None):
            for first in (self._catch_up, self._monitor_system):
                self._repeat(first, ATTEMPTS)
        while (call := self._pending.get()) is not None:
            if self.run_id is None or not self._repeat(call, ATTEMPTS):
                self.num_dropped += 1

    def _repeat(self, call: Callable[[], None], attempts: int | None) -> bool:
        """Whether one of so many attempts succeeded; None: attempts until `finish` is called."""
        for attempt in itertools.count(1):
            if self._attempt(call):
                break
            if attempt == attempts or self._hurry.is_set():
                return False
            self._hurry.wait(PAUSE_S)
        return True

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever a tracking store raises is only counted
            self.num_failures += 1
            self.last_error = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            if self.num_failures == 1:
                print(f"tracking: {self._uri}: {self.last_error}; training goes on", flush=True)
            return False
        return True

    def _open(self) -> None:
        """The run of `mlflow_run.json`, or a new one whose id is written there."""
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        run_id = self._stored_run_id()
        if run_id is not None and not self._has_run(run_id):
            print(
                f"tracking: {self._uri} no longer has the run {run_id}; it is made anew, with the "
                "figures of the run's own history",
                flush=True,
            )
            run_id = None
        if run_id is None:
            run = self._client.create_run(self._experiment_id(), run_name=self._run_name)
            run_id = run.info.run_id
            entry = {"run_id": run_id, "experiment_id": run.info.experiment_id}
            content = json.dumps({**entry, "tracking_uri": self._uri})
            replace_file(self._run_file, content.encode())
        else:
            run = self._client.get_run(run_id)
            self._client.update_run(run_id, status="RUNNING")
            for metric in run.data._metric_objs:  # the last step of each; a history can be huge
                self._written[metric.key] = metric.step
            note = run.data.tags.get("mlflow.note.content", "")
            self._pictures = {name: int(step) for name, step in _PICTURE.findall(note)}
        for key, value in self._tags.items():
            self._client.set_tag(run_id, key, value)
        self.run_id = run_id

    def _catch_up(self) -> None:
        if self._history is not None:
            self._write_rows(_read_history(self._history))

    def _monitor_system(self) -> None:
        if self._wants_system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                self.run_id, resume_logging=True, tracking_uri=self._uri
            )
            self._monitor.start()

    def _stored_run_id(self) -> str | None:
        """None also when the file is of another tracking server."""
        entry = _read_entry(self._run_file)
        return entry["run_id"] if entry.get("tracking_uri") == self._uri else None

    def _has_run(self, run_id: str) -> bool:
        """False if the store was deleted, or the run in it."""
        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _experiment_id(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment)
        if known is not None:
            return known.experiment_id
        return self._client.create_experiment(self._experiment, artifact_location=self._artifacts)

    def _flush(self) -> None:
        """Everything that is pending; kept if that fails."""
        with self._lock:
            rows, self._metrics, self._flush_waits = self._metrics, [], False
        try:
            self._write_rows(rows)
        except BaseException:
            with self._lock:
                self._metrics = rows + self._metrics
            raise

    def _write_rows(self, rows: list[Row]) -> None:
        """All but those at or before the step that their key already has."""
        from mlflow.entities import Metric

        new = [row for row in rows if row[3] > self._written.get(row[0], -1)]
        for start in range(0, len(new), MAX_METRICS):
            part = new[start : start + MAX_METRICS]
            self._client.log_batch(self.run_id, metrics=[Metric(*row) for row in part])
            self._written.update({key: step for key, _, _, step in part})

    def _write_overview(self, overview: Overview) -> None:
        """The run's note, and its data sets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self._overview = overview
        inputs = []
        for row in overview.data:
            what = {key: value for key, value in asdict(row).items() if key.startswith("num_")}
            store = row.path.partition("://")[0] if "://" in row.path else "local"
            source, profile = json.dumps({"uri": row.path}), json.dumps(what)
            inputs.append(
                DatasetInput(
                    Dataset(row.name, row.fingerprint, store, source, profile=profile),
                    [InputTag("mlflow.data.context", row.teaches)],
                )
            )
        self._client.log_inputs(self.run_id, datasets=inputs)
        self._write_note("running")

    def _write_note(self, status: str) -> None:
        """What came of the run so far, what it is, and the newest pictures."""
        if self._overview is None:
            return
        figures = sorted(self._client.get_run(self.run_id).data.metrics.items())
        scores = [f"{name.removeprefix('scores/')} {value:.2f}"
                  for name, value in figures if name.startswith("scores/")]  # fmt: skip
        lines = [f"**{status}** {', '.join(scores)}", "", *described(self._overview)]
        lines += ["", f"`{self._tags.get('memseg.command', '')}`", ""]
        for name, step in self._pictures.items():
            link = f"get-artifact?path=note/{quote(name)}.png&run_uuid={self.run_id}&step={step}"
            lines.append(f"{name}, step {step}\n\n![]({link})\n")
        self._client.set_tag(self.run_id, "mlflow.note.content", "\n".join(lines)[:MAX_NOTE])

    def _write_params(self, params: Mapping[str, str], defaults: Collection[str]) -> None:
        """Those that differ from their defaults. MLflow's parameters are written once; what a
        restart changed becomes a tag.
        """
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        changed = [_key(name) for name in params if name not in defaults]
        params = {_key(name): _shortened(str(value)) for name, value in params.items()}
        new = [Param(name, params[name]) for name in changed if name not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self._client.log_batch(self.run_id, params=new[start : start + MAX_PARAMS])
        for name, value in params.items():
            if known.get(name, value) != value:
                self._client.set_tag(self.run_id, f"resumed.{name}", f"{known[name]} -> {value}")

    def _close(self, status: str) -> None:
        if self._monitor is not None:
            self._monitor.finish()
        self._client.set_terminated(self.run_id, _STATUS[status])
        self._write_note(status)


def _read_history(path: str) -> list[Row]:
    """The rows of a file of figures; a line that a kill cut short is left out."""
    if not exists(path):
        return []
    now, rows = int(time.time() * 1000), []
    for line in read_bytes(path).decode().splitlines(keepends=True):
        if line.endswith("\n"):
            figures = json.loads(line)
            step = figures.pop("step")
            rows += [(_metric(name), float(value), now, step) for name, value in figures.items()]
    return rows


def described(overview: Overview) -> list[str]:
    """Lines of Markdown."""
    lines = [overview.title, ""]
    for row in overview.data:
        slots = f", {row.slots} a step" if row.slots else ""
        lines.append(
            f"- data **{row.name}** ({row.teaches}): {row.num_images:,} images{slots}; "
            f"{row.num_present:,} of {row.num_classes:,} classes are present"
        )
    lines += [f"- {name}: {fact}" for name, fact in overview.facts.items()]
    return [*lines, *(f"- **warning** {text}" for text in overview.warnings)]


def _metric(name: str) -> str:
    """`loss/masks/seg` -> `losses/masks seg`: one group of charts for all that is before a "/"."""
    first, _, rest = name.partition("/")
    readable = (rest or ("all" if first == "loss" else first)).replace("/", " ").replace("_", " ")
    return _key(f"{_GROUPS.get(first, first)}/{readable.replace('miou', 'mIoU')}")


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_VALUE else f"{value[: MAX_VALUE - 3]}..."


def _read_entry(path: str) -> dict[str, Any]:
    """What `mlflow_run.json` says; empty if it is not there or damaged."""
    try:
        return read_json(path) if exists(path) else {}
    except ValueError:
        return {}


def run_page(directory: str, uri: str) -> str | None:
    """The address of a run's page; None if it has none. MLflow opens for traces of language models
    unless an address says otherwise.
    """
    entry = _read_entry(f"{directory.rstrip('/')}/{RUN_FILE}")
    if "experiment_id" not in entry:
        return None
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    run = f"experiments/{entry['experiment_id']}/runs/{entry['run_id']}"
    return f"{server}/#/{run}?workflowType=machine_learning"


def _key(name: str) -> str:
    return _BAD_CHARACTERS.sub("_", name)[:MAX_KEY]
