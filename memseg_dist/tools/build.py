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
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain, starmap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from memseg_dist.data.files import make_folder, write_atomically
from memseg_dist.data.schema import part_name, shard_name
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.tools.recipe import (
    Picture,
    ReadImage,
    ReadMask,
    Skipped,
    cut_into_shards,
    files_stamp,
    picture_bytes,
    picture_files,
    picture_samples,
)
from memseg_dist.tools.shards import Sample, finish, write_shard
from memseg_dist.tools.verify import verify

NOTES = ".build"
PLAN = "plan.json"
_SHOWN = 20
"""Classes that a report names."""


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
    """Size of the files that a shard is made of, at most."""
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
class BuildReport:
    """Sums over the shards of one split; num_resumed shards were there already.

    skipped: (key, reason) of what was left out. images_of: images by the name of each class.
    """

    root: Path
    num_samples: int
    num_shards: int
    num_bytes: int
    num_resumed: int
    skipped: tuple[tuple[str, str], ...]
    images_of: tuple[tuple[str, int], ...] = ()
    num_unlabelled: int = 0

    def __str__(self) -> str:
        resumed = f", {self.num_resumed} of them built before" if self.num_resumed else ""
        lines = [
            f"{self.root}: {self.num_samples:,} images in {self.num_shards} shards{resumed}, "
            f"{self.num_bytes / 2**20:,.1f} MiB",
            *_class_lines(self.images_of),
        ]
        if self.num_unlabelled:
            lines.append(f"  {self.num_unlabelled:,} images without a class")
        if self.skipped:
            lines.append(f"  {len(self.skipped):,} left out:")
        for reason, count in Counter(reason for _, reason in self.skipped).most_common():
            key = next(key for key, why in self.skipped if why == reason)
            lines.append(f"    {count} x {reason} (such as {key})")
        return "\n".join(lines)


def _class_lines(images_of: Sequence[tuple[str, int]]) -> list[str]:
    """Images per class: of each, or of the rarest and the most frequent where they are many."""
    some = sorted((item for item in images_of if item[1]), key=lambda item: item[1])
    none = [name for name, count in images_of if not count]
    shown = [f"{name} {count:,}" for name, count in some]
    if len(shown) > _SHOWN:
        shown = [*shown[: _SHOWN // 2], "...", *shown[-_SHOWN // 2 :]]
    lines = [f"  {len(images_of):,} classes, images of each: {', '.join(shown)}"]
    if none:
        more = " ..." if len(none) > _SHOWN else ""
        lines.append(f"  {len(none):,} classes without an image: {', '.join(none[:_SHOWN])}{more}")
    return lines


def command_line(
    build: Callable[[Any], object], recipe: Any, arguments: Sequence[str] | None = None
) -> None:
    """Run `build` on what the command line says; a user's mistake is one line, not a traceback."""
    options = tyro.cli(recipe, args=arguments)
    try:
        build(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def build_pictures(
    root: Path,
    vocabulary: Vocabulary,
    pictures: Sequence[Picture],
    options: BuildOptions,
    *,
    read_mask: ReadMask | None = None,
    labels_only: bool = False,
    read_image: ReadImage | None = None,
    left_out: Sequence[Skipped] = (),
) -> BuildReport:
    """Shards of picture files (see `Picture`, `picture_samples`), cut by the options."""
    chunks = cut_into_shards(
        pictures,
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.megabytes_per_shard * 2**20,
        num_bytes=picture_bytes,
        shuffle_seed=options.shuffle_seed,
        limit=options.limit,
    )
    make = functools.partial(picture_samples, read_mask=read_mask, labels_only=labels_only)
    if read_image is not None:
        make = functools.partial(make, read_image=read_image)
    tasks = [ShardTask(make, chunk) for chunk in chunks]
    stamp = files_stamp(file for chunk in chunks for item in chunk for file in picture_files(item))
    return build_dataset(root, vocabulary, tasks, options, left_out, stamp)


def build_dataset(
    root: Path,
    vocabulary: Vocabulary,
    tasks: Sequence[ShardTask],
    options: BuildOptions,
    left_out: Sequence[Skipped] = (),
    stamp: str = "",
) -> BuildReport:
    """Write one shard per task below `root`, then the index; print a report.

    left_out: what no task was made of, for the report. stamp: of the files that the tasks read
    (`files_stamp`); another one is other input.

    A shard that is whole is not built again, so a killed run is repeated by the same command.
    ValueError for an output folder that cannot be written to, that was built from something else
    (unless options.overwrite), or for whatever is wrong with a sample.
    """
    if not tasks:
        raise ValueError(f"nothing to write to {root}: no images were listed; check the input")
    console = Console(stderr=True)
    _check_plan(root, [vocabulary.to_json(), tasks, stamp], len(tasks), options.overwrite)
    pending = [number for number in range(len(tasks)) if _read_note(root, number) is None]
    jobs = [(root, number, tasks[number], len(vocabulary)) for number in pending]
    done = len(tasks) - len(jobs)
    built: Iterable[None] = starmap(_build_shard, jobs)
    if jobs and options.workers != 0:
        built = _on_ray(jobs, options.workers)
    try:
        for _ in track(built, f"{root}", len(tasks), done, console=console):
            pass
    except KeyboardInterrupt:
        console.print("stopped; whole shards are kept: run the same command to go on")
        raise
    notes = [_note_of(root, number) for number in range(len(tasks))]
    skipped = tuple((key, reason) for note in notes for key, reason in note["skipped"])
    skipped += tuple((item.key, item.reason) for item in left_out)
    if not any(note["num_samples"] for note in notes):
        reasons = sorted({reason for _, reason in skipped})
        raise ValueError(f"{root}: every image was skipped ({'; '.join(reasons[:3])})")
    index = finish(root, vocabulary)
    for left_by_a_kill in root.glob(".shard-*.tmp"):
        left_by_a_kill.unlink()
    num_bytes = sum((root / name).stat().st_size for name in index.shard_names)
    images = index.class_image_counts(len(vocabulary)).tolist()
    report = BuildReport(
        root, len(index), len(index.shard_names), num_bytes, done, skipped,
        tuple(zip(vocabulary.names, images)), int((np.diff(index.labels_offsets) == 0).sum()),
    )  # fmt: skip
    print(report)
    if options.verify:
        print(f"  verified: {verify(root)}")
    return report


def _build_shard(root: Path, number: int, task: ShardTask, num_classes: int) -> None:
    """Write the shard, then its note: the note's presence means that the shard is whole.

    One without a note is written again, since only its note tells what was skipped.
    """
    (root / part_name(number)).unlink(missing_ok=True)
    skipped: list[tuple[str, str]] = []

    def kept() -> Iterator[Sample]:
        for sample in task.make(task.payload):
            if isinstance(sample, Skipped):
                skipped.append((sample.key, sample.reason))
            else:
                yield sample

    samples, num_samples = kept(), 0
    first = next(samples, None)
    if first is not None:
        num_samples = write_shard(root, number, chain([first], samples), num_classes=num_classes)
    note = {"num_samples": num_samples, "skipped": skipped}
    write_atomically(_note_path(root, number), json.dumps(note).encode())


def _note_of(root: Path, number: int) -> dict[str, Any]:
    note = _read_note(root, number)
    if note is None:
        raise ValueError(
            f"{_note_path(root, number)} is not there, although its shard was built: does every "
            "machine of the cluster see this folder?"
        )
    return note


def _note_path(root: Path, number: int) -> Path:
    return root / NOTES / f"{shard_name(number)}.json"


def _read_note(root: Path, number: int) -> dict[str, Any] | None:
    """What came of a shard, if it is whole."""
    path = _note_path(root, number)
    note = json.loads(path.read_text()) if path.exists() else None
    is_there = note is None or not note["num_samples"] or (root / shard_name(number)).exists()
    return note if is_there else None


def _on_ray(
    jobs: Sequence[tuple[Path, int, ShardTask, int]], workers: int | None
) -> Iterator[None]:
    """Yields once per finished shard; at most two tasks per core are in flight.

    Threads wait for the tasks: Ctrl-C inside Ray's C++ code can abort the process.
    """
    import ray
    from ray.exceptions import RayTaskError

    from memseg_dist.platforms.ray_init import init_ray

    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {"address": "local", "num_cpus": workers} if workers else {}
        init_ray(include_dashboard=False, log_to_driver=False, **local)
    for module in {_unwrap(task.make).__module__ for _, _, task, _ in jobs}:
        if module != "__main__" and not module.startswith("memseg_dist."):
            ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    remote = ray.remote(num_cpus=1, max_retries=2)(_build_shard)
    running: list[Any] = []

    def build(job: tuple[Path, int, ShardTask, int]) -> None:
        reference = remote.remote(*job)
        running.append(reference)
        ray.get(reference)
        running.remove(reference)

    pool = ThreadPoolExecutor(2 * max(1, int(ray.cluster_resources().get("CPU", 1))))
    try:
        for future in as_completed([pool.submit(build, job) for job in jobs]):
            yield future.result()
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for reference in [*running]:
            ray.cancel(reference, force=True)
        pool.shutdown()
        if started:
            ray.shutdown()


def _check_plan(root: Path, made_of: Any, num_shards: int, overwrite: bool) -> None:
    """Refuse to mix two builds in one folder; start afresh where that was asked for."""
    make_folder(root)
    content = json.dumps(made_of, default=_plain).encode()
    fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()
    plan = {"format": 1, "fingerprint": fingerprint, "num_shards": num_shards}
    path = root / NOTES / PLAN
    if path.exists() and json.loads(path.read_text()) == plan:
        return
    if any(item not in (path, path.parent) for item in root.rglob("*")):
        if not (overwrite and path.exists()):
            raise ValueError(
                f"{root} holds other files, or shards of other input or options: name another "
                "folder, or give --overwrite to build this one anew"
            )
        shutil.rmtree(root)
    write_atomically(path, json.dumps(plan).encode())


def _plain(value: Any) -> Any:
    """What JSON does not know, by content: the same in every process and on every machine. Fields
    that do not count when two are compared do not count here.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in fields(value) if item.compare}
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, np.ndarray):
        content = hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest()
        return [str(value.dtype), value.shape, content]
    return value.__qualname__ if callable(value) else f"{type(value).__name__} {value}"


def _unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    return _unwrap(function.func) if isinstance(function, functools.partial) else function
