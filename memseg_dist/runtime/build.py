"""Build shards in parallel: one Ray task per shard, resumable, with a progress bar and a report.

    tasks = [ShardTask(make_samples, payload) for payload in payloads]
    build_dataset(options.out / "train", vocabulary, tasks, options)

`make_samples(payload)` yields Samples (or Skipped with the reason) lazily, inside the task. A
cluster's nodes must see the input and the output folders under the same paths.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memseg_dist.data.files import make_folder, write_atomically
from memseg_dist.data.recipe import (
    Picture,
    ReadMask,
    Skipped,
    cut_into_shards,
    picture_bytes,
    picture_samples,
)
from memseg_dist.data.schema import shard_name
from memseg_dist.data.shards import Sample, finish, write_shard
from memseg_dist.data.verify import verify
from memseg_dist.data.vocabulary import Vocabulary

NOTES = ".build"
PLAN = "plan.json"


@dataclass(frozen=True)
class BuildOptions:
    """How to build; the same for every recipe."""

    out: Path
    """Folder to write the splits to, one sub-folder each."""
    workers: int | None = None
    """Parallel tasks on this machine; 0 = in this process, without Ray; default: the running Ray
    cluster (RAY_ADDRESS, or one that was started here), else all cores."""
    limit: int | None = None
    """At most so many images per split, drawn at random."""
    samples_per_shard: int = 1000
    """Images in a shard, at most."""
    megabytes_per_shard: int = 256
    """Size of a shard, at most."""
    shuffle_seed: int | None = 0
    """Images are dealt out to shards in this random order; None keeps the order of the listing."""
    verify: bool = False
    """Decode every member of what was written."""
    overwrite: bool = False
    """Delete what is in the output folder if it was built from other input or options."""


Options = Annotated[BuildOptions, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class ShardTask:
    """What one shard is made of. `make` is a module-level function or a partial of one."""

    make: Callable[[Any], Iterable[Sample | Skipped]]
    payload: Any


@dataclass(frozen=True)
class ShardNote:
    """What came of one shard."""

    num_samples: int
    num_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class BuildReport:
    """Sums over the shards of one split; num_resumed shards were there already."""

    root: Path
    num_samples: int
    num_shards: int
    num_bytes: int
    num_resumed: int
    skipped: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        resumed = f", {self.num_resumed} of them built before" if self.num_resumed else ""
        lines = [
            f"{self.root}: {self.num_samples:,} images in {self.num_shards} shards{resumed}, "
            f"{self.num_bytes / 2**20:,.1f} MiB"
        ]
        if self.skipped:
            lines.append(f"  {len(self.skipped)} images skipped:")
        for reason, count in Counter(reason for _, reason in self.skipped).most_common():
            key = next(key for key, why in self.skipped if why == reason)
            lines.append(f"    {count} x {reason} (such as {key})")
        return "\n".join(lines)


def command_line(
    build: Callable[[Any], object], recipe: Any, arguments: Sequence[str] | None = None
) -> None:
    """Run `build` on what the command line says; a user's mistake is one line, not a traceback."""
    options = tyro.cli(recipe, args=arguments)
    try:
        build(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def build_pictures(
    root: Path,
    vocabulary: Vocabulary,
    pictures: Sequence[Picture],
    options: BuildOptions,
    *,
    read_mask: ReadMask | None = None,
    labels_only: bool = False,
) -> BuildReport:
    """Shards of picture files (see `Picture`), cut by the options."""
    chunks = cut_into_shards(
        pictures,
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.megabytes_per_shard * 2**20,
        num_bytes=picture_bytes,
        shuffle_seed=options.shuffle_seed,
        limit=options.limit,
    )
    make = functools.partial(picture_samples, read_mask=read_mask, labels_only=labels_only)
    return build_dataset(root, vocabulary, [ShardTask(make, chunk) for chunk in chunks], options)


def build_dataset(
    root: Path, vocabulary: Vocabulary, tasks: Sequence[ShardTask], options: BuildOptions
) -> BuildReport:
    """Write one shard per task below `root`, then the index; print a report.

    A shard that is whole is not built again, so a killed run is repeated by the same command.
    ValueError for an output folder that cannot be written to, that was built from something else
    (unless options.overwrite), or for whatever is wrong with a sample.
    """
    if not tasks:
        raise ValueError(f"nothing to write to {root}: no images were listed; check the input")
    console = Console(stderr=True)
    _check_plan(root, vocabulary, tasks, options.overwrite)
    pending = [number for number in range(len(tasks)) if _read_note(root, number) is None]
    jobs = [(root, number, tasks[number], len(vocabulary)) for number in pending]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TimeRemainingColumn(),
    )
    runner = _in_process(jobs) if options.workers == 0 else _on_ray(jobs, options.workers)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(str(root), total=len(tasks), completed=len(tasks) - len(pending))
        try:
            for _ in runner if jobs else ():
                progress.advance(bar)
        except KeyboardInterrupt:
            console.print("stopped; whole shards are kept: run the same command to go on")
            raise SystemExit(130) from None
    return _finish(root, vocabulary, tasks, len(tasks) - len(pending), options.verify)


def _finish(
    root: Path, vocabulary: Vocabulary, tasks: Sequence[ShardTask], resumed: int, check: bool
) -> BuildReport:
    notes = [_read_note(root, number) or ShardNote(0, 0) for number in range(len(tasks))]
    skipped = tuple(chain.from_iterable(note.skipped for note in notes))
    num_samples = sum(note.num_samples for note in notes)
    if not num_samples:
        reasons = sorted({reason for _, reason in skipped})
        raise ValueError(f"{root}: every image was skipped ({'; '.join(reasons[:3])})")
    finish(root, vocabulary)
    for left_by_a_kill in root.glob(".shard-*.tmp"):
        left_by_a_kill.unlink()
    report = BuildReport(
        root=root,
        num_samples=num_samples,
        num_shards=sum(note.num_samples > 0 for note in notes),
        num_bytes=sum(note.num_bytes for note in notes),
        num_resumed=resumed,
        skipped=skipped,
    )
    print(report)
    if check:
        print(f"  verified: {verify(root)}")
    return report


def _build_shard(root: Path, number: int, task: ShardTask, num_classes: int) -> None:
    """Write the shard, then its note: the note's presence means that the shard is whole."""
    skipped: list[tuple[str, str]] = []

    def kept() -> Iterator[Sample]:
        for sample in task.make(task.payload):
            if isinstance(sample, Skipped):
                skipped.append((sample.key, sample.reason))
            else:
                yield sample

    samples = kept()
    first = next(samples, None)
    note = ShardNote(0, 0)
    if first is not None:
        report = write_shard(root, number, chain([first], samples), num_classes=num_classes)
        note = ShardNote(report.num_samples, report.num_bytes)
    text = json.dumps({**asdict(note), "skipped": skipped})
    write_atomically(_note_path(root, number), text.encode())


def _note_path(root: Path, number: int) -> Path:
    return root / NOTES / f"{shard_name(number)}.json"


def _read_note(root: Path, number: int) -> ShardNote | None:
    path = _note_path(root, number)
    if not path.exists():
        return None
    value = json.loads(path.read_text())
    if value["num_samples"] and not (root / shard_name(number)).exists():
        return None
    skipped = tuple((key, reason) for key, reason in value["skipped"])
    return ShardNote(value["num_samples"], value["num_bytes"], skipped)


def _in_process(jobs: Sequence[tuple[Path, int, ShardTask, int]]) -> Iterator[None]:
    for job in jobs:
        _build_shard(*job)
        yield None


def _on_ray(
    jobs: Sequence[tuple[Path, int, ShardTask, int]], workers: int | None
) -> Iterator[None]:
    """Yields once per finished shard; at most two tasks per core are in flight."""
    import ray
    from ray.exceptions import RayTaskError

    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {"address": "local", "num_cpus": workers} if workers else {}
        ray.init(include_dashboard=False, log_to_driver=False, **local)
    for module in {_unwrap(task.make).__module__ for _, _, task, _ in jobs}:
        if module != "__main__" and not module.startswith("memseg_dist."):
            ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    remote = ray.remote(num_cpus=1, max_retries=2)(_build_shard)
    queue = iter(jobs)
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running = [remote.remote(*job) for job in islice(queue, limit)]
    try:
        with _deferred_interrupt() as interrupted:
            while running:
                done, running = ray.wait(running, num_returns=1, timeout=0.5)
                ray.get(done)
                yield from [None] * len(done)
                running += [remote.remote(*job) for job in islice(queue, len(done))]
                if interrupted.is_set():
                    raise KeyboardInterrupt
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        raise
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C only sets the event: raised inside Ray's C++ code it can abort the process."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _check_plan(
    root: Path, vocabulary: Vocabulary, tasks: Sequence[ShardTask], overwrite: bool
) -> None:
    """Refuse to mix two builds in one folder; start afresh where that was asked for."""
    make_folder(root)
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, vocabulary.to_json())
    _feed(digest, tasks)
    plan = {"format": 1, "fingerprint": digest.hexdigest(), "num_shards": len(tasks)}
    path = root / NOTES / PLAN
    if path.exists() and json.loads(path.read_text()) == plan:
        return
    empty = all(item.name == NOTES for item in root.iterdir()) and (
        not path.exists() or [*path.parent.iterdir()] == [path]
    )
    if not empty:
        if not (overwrite and path.exists()):
            raise ValueError(
                f"{root} holds other files, or shards of other input or options: name another "
                "folder, or give --overwrite to build this one anew"
            )
        shutil.rmtree(root)
    write_atomically(path, json.dumps(plan).encode())


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a hash, by content: the same in every process and on every machine."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    if isinstance(value, Mapping):
        value = sorted(value.items(), key=repr)
    if isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}\n".encode())
        for item in value:
            _feed(digest, item)
    elif callable(value):
        digest.update(f"function {value.__qualname__}\n".encode())
    else:
        digest.update(f"{type(value).__name__} {value}\n".encode())


def _unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    return _unwrap(function.func) if isinstance(function, functools.partial) else function
