"""Checkpoints that any number of workers can read: safetensors, JSON, and hashes written last.

    step-00000100/
        model.safetensors                       weights and buffers
        optimizer.safetensors                   KEY/PARAMETER tensors and the update count
        memory-NAME-00000-of-00002.safetensors  what rank 0 of 2 owned of `Method.state()[NAME]`
        run.json                                step, config, label space, data's fingerprints
        manifest.json                           SHA-256 and size of each file, rows of each memory

Without a manifest a directory is torn: it is never chosen, named in a warning, and deleted when the
next checkpoint is whole. Locally all files are written under `.tmp` and renamed; at a URL the
manifest, written last, makes it whole (`train.saver`).
Nothing is pickled. Random numbers need no state: they are derived from seed, step and slot.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from memseg_dist import dist
from memseg_dist.checks import require
from memseg_dist.config import RunConfig
from memseg_dist.data.files import filesystem_of, join, open_binary, reading
from memseg_dist.data.splits import split_name
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.jsonable import decode, encode, flatten, parse
from memseg_dist.memory.state import Reader, Stateful
from memseg_dist.train.engine import Engine, EngineState
from memseg_dist.train.storage import local_copy, read_json, reading_tensors, together

FORMAT = 1
MANIFEST = "manifest.json"
_MISSING = (FileNotFoundError, NotADirectoryError)
log = logging.getLogger(__name__)

FREE_KEYS = ("name", "storage", "resume", "validation", "launch", "engine", "tracking", "loader")
"""What may change when a run is resumed; so may `every` and the paths of the sources."""


class DamagedCheckpoint(ValueError):
    """A file is not as it was written. The text names it."""


def latest(directory: str) -> str | None:
    """The newest whole checkpoint under `directory`, or None. Torn ones are named in a warning."""
    return max(whole_checkpoints(directory), default=None)


def whole_checkpoints(directory: str) -> list[str]:
    """The whole checkpoints under `directory`, oldest first. Torn ones are named in a warning."""
    checkpoints = survey(directory)
    for path in (path for path, is_whole in checkpoints.items() if not is_whole):
        log.warning("ignoring the incomplete checkpoint %s", path)
    return [path for path, is_whole in checkpoints.items() if is_whole]


def discard(paths: Sequence[str]) -> None:
    """Take their manifests away: nothing chooses them any more, and the next one deletes them."""
    for path in paths:
        filesystem, remote = filesystem_of(path)
        filesystem.rm_file(join(remote, MANIFEST))


Part = tuple[str, int, int]
"""(file, start, stop): the file has rows [start, stop) of a tensor; (file, -1, -1): all of it."""


@dataclass(frozen=True)
class FileEntry:
    """What was written to one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: every file of a checkpoint, and which of them hold which rows of a memory's
    tensors, ascending."""

    format: int
    step: int
    files: Mapping[str, FileEntry]
    memories: Mapping[str, Mapping[str, tuple[Part, ...]]]

    def __post_init__(self) -> None:
        tensors = {
            f"memories.{memory}.{name}": parts
            for memory, saved in self.memories.items()
            for name, parts in saved.items()
        }
        named = {part[0] for parts in tensors.values() for part in parts}
        strange = sorted(name for name in self.files if name != Path(name).name)
        require(not strange, "files", strange, "files of the checkpoint's own directory")
        missing = sorted({"model.safetensors", "optimizer.safetensors", "run.json"} | named)
        missing = [name for name in missing if name not in self.files]
        require(not missing, "files", sorted(self.files), f"a list that has {missing} too")
        for key, parts in tensors.items():
            starts, bounds = [part[1] for part in parts], [0, *(part[2] for part in parts)]
            is_in_parts = starts == bounds[:-1] != [] and bounds == sorted(bounds)
            wanted = "one file or more, with all (-1, -1) or rows from 0 without a gap"
            require(is_in_parts or [part[1:] for part in parts] == [(-1, -1)], key, parts, wanted)


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint, opened lazily. Errors are ValueErrors that name the file."""

    path: str

    @cached_property
    def manifest(self) -> Manifest:
        where = join(self.path, MANIFEST)
        value = read_json(where)
        if value.get("format") != FORMAT:
            raise ValueError(
                f"{where}: format {value.get('format')!r}, this version reads {FORMAT}"
            )
        return decode(Manifest, value, where)

    @cached_property
    def _run(self) -> dict[str, Any]:
        where = join(self.path, "run.json")
        run = read_json(where)
        if not {"config", "label_space"} <= run.keys():
            raise ValueError(f"{where} has only {sorted(run)}; delete {self.path}")
        return run

    @property
    def step(self) -> int:
        """How many steps had been done."""
        return self.manifest.step

    @cached_property
    def config(self) -> RunConfig:
        return decode(RunConfig, self._run["config"], join(self.path, "run.json"))

    @cached_property
    def label_space(self) -> LabelSpace:
        where = join(self.path, "run.json")
        return LabelSpace.from_json(self._run["label_space"], f"{where}: label_space")

    @cached_property
    def data(self) -> dict[str, str]:
        """What `TrainLoader.fingerprints` was; {} in checkpoints of earlier versions."""
        where = join(self.path, "run.json")
        return decode(dict[str, str], self._run.get("data", {}), f"{where}: data")

    def weights(self) -> dict[str, Tensor]:
        return self._tensors("model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return self._tensors("optimizer.safetensors")

    def reader(self, memory: str) -> Reader:
        """Reads rows of the tensors of one of `Method.state()`, from the files that hold them."""
        saved = self._parts(memory)

        def read(name: str, start: int = 0, stop: int | None = None) -> Tensor:
            if name not in saved:
                raise ValueError(f"{self.path}: memory '{memory}' has no tensor '{name}'")
            return self._read_rows(saved[name], name, start, stop)

        return read

    def files_of(self, memory: str) -> list[str]:
        """The files that hold one of `Method.state()`."""
        return sorted({part[0] for parts in self._parts(memory).values() for part in parts})

    def verify(self, files: list[str] | None = None) -> None:
        """DamagedCheckpoint for the first of `files` (default: all) that is not as it was
        written."""
        for name in sorted(self.manifest.files if files is None else files):
            expected, where = self.manifest.files[name].sha256, join(self.path, name)
            with open_binary(where) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            if found != expected:
                raise DamagedCheckpoint(
                    f"{where} is damaged: SHA-256 is {found}, the manifest says "
                    f"{expected}; delete {self.path} to use an earlier checkpoint"
                )

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Within, a ValueError of whoever takes over what is read names this checkpoint."""
        try:
            yield
        except ValueError as error:
            if self.path in str(error):
                raise
            raise ValueError(f"{self.path}: {error}") from error

    def verify_together(self) -> None:
        """Every rank checks its share of the files; an error is raised on all. Collective."""
        files = sorted(self.manifest.files)

        def damage() -> str | None:
            try:
                self.verify(files[dist.rank() :: dist.size()])
            except DamagedCheckpoint as error:
                return str(error)
            return None

        for found in filter(None, together(damage)):
            raise DamagedCheckpoint(found)

    def _parts(self, memory: str) -> Mapping[str, Sequence[Part]]:
        saved = self.manifest.memories
        if memory not in saved:
            raise ValueError(
                f"{self.path} holds no memory '{memory}', only {sorted(saved)}; "
                "resume with the method that wrote it"
            )
        return saved[memory]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        where = join(self.path, name)
        with local_copy(where) as path, reading_tensors(where):
            return load_file(path)

    def _read_rows(self, parts: Sequence[Part], name: str, start: int, stop: int | None) -> Tensor:
        if parts[0][1] < 0:
            with self._open(parts[0][0]) as file:
                tensor = file.get_tensor(name)
                return tensor[start:stop] if tensor.ndim else tensor
        stop = parts[-1][2] if stop is None else stop
        found: list[Tensor] = []
        for file_name, first, last in parts:
            low, high = max(first, start), min(last, stop)
            if low < high or (not found and file_name == parts[-1][0]):  # at least the shape
                with self._open(file_name) as file:
                    found.append(file.get_slice(name)[max(low - first, 0) : max(high - first, 0)])
        rows = torch.cat(found)
        if len(rows) != max(stop - start, 0):
            raise ValueError(
                f"{join(self.path, MANIFEST)}: rows {start}:{stop} of '{name}' are not all in "
                f"{parts}; delete {self.path} to resume from an earlier checkpoint"
            )
        return rows

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        where = join(self.path, name)
        with (
            local_copy(where) as path,
            reading_tensors(where),
            safe_open(path, framework="pt") as file,
        ):
            yield file


def load(
    checkpoint: Checkpoint,
    engine: Engine,
    memories: Mapping[str, Stateful],
    config: RunConfig,
    label_space: LabelSpace,
    data: Mapping[str, str],
) -> int:
    """Take over a run at any number of workers. Collective. Returns the steps done.

    data: `TrainLoader.fingerprints`. ValueError for a damaged file (DamagedCheckpoint), another
    label space, another config or other data.
    """
    checkpoint.verify_together()
    check_same_run(checkpoint, config, label_space, data)
    with checkpoint.naming():
        engine.load(EngineState(checkpoint.weights(), checkpoint.optimizer()))
        for name, memory in sorted(memories.items()):
            memory.load_state_dict(checkpoint.reader(name))
    return checkpoint.step


def check_same_run(
    checkpoint: Checkpoint, config: RunConfig, label_space: LabelSpace, data: Mapping[str, str]
) -> None:
    """ValueError if going on with `config` would not be the run that wrote the checkpoint."""
    before, now = _identity(checkpoint.config), _identity(config)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        listing = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed[:5])
        raise ValueError(
            f"{checkpoint.path} was written by another config ({len(changed)} values differ: "
            f"{listing}); give the run another name, or the config its old values"
        )
    if checkpoint.label_space != label_space:
        saved, new = checkpoint.label_space.vocabulary, label_space.vocabulary
        differing = [uid for uid in saved.uids if uid not in new] + [
            uid for uid in new.uids if uid not in saved
        ]
        raise ValueError(
            f"{checkpoint.path} was written with another label space: {len(saved)} classes then, "
            f"{len(new)} now; only in one of them: {differing[:5]}. A vocabulary.json of a source "
            "has changed; restore it, or give the run another name"
        )
    others = [part for part, was in checkpoint.data.items() if data.get(part) != was]
    if others:
        raise ValueError(
            f"{checkpoint.path} was written with other data of {', '.join(others)} (shards, split, "
            "labels or masks have changed): going on would repeat some samples of the epoch and "
            "leave out others; restore the data, or give the run another --name and begin it with "
            "the backbone of this checkpoint (memseg_dist.tools.export, --backbone.pretrained)"
        )


def _identity(config: RunConfig) -> dict[str, str]:
    """What must not change within a run, flat."""
    # what `relabel` does is compared in the label space
    value = {k: v for k, v in encode(config).items() if k not in (*FREE_KEYS, "every", "relabel")}
    for source in value["sources"]:
        source.pop("path")
        for name in ("saliency", "pseudo_masks"):
            source[name] = source[name] is not None  # whether, not where
        source["split"] = source["split"] and split_name(source["split"])
    value["backbone"].pop("pretrained")  # where the first weights came from
    return flatten(value)


def survey(directory: str) -> dict[str, bool]:
    """Each checkpoint's path, oldest first, and whether it is whole."""
    filesystem, root = filesystem_of(directory)
    filesystem.invalidate_cache()
    if not filesystem.isdir(root):
        return {}
    names = sorted(Path(path).name for path in filesystem.ls(root, detail=False))
    paths = [join(directory, name) for name in names if name.startswith("step-")]
    return {path: not path.endswith(".tmp") and _is_whole(path) for path in paths}


def _is_whole(path: str) -> bool:
    """Whether the manifest is there and every file it lists has its size. What another version
    wrote counts as whole, so that it is not passed over but refused when it is read. ValueError if
    the store does not answer: what cannot be read now is not torn.
    """
    where = join(path, MANIFEST)
    filesystem, manifest = filesystem_of(where)
    with reading(where):
        try:
            content = filesystem.cat_file(manifest)
        except _MISSING:
            return False
    try:
        value = parse(content, where)
        if isinstance(value, dict) and value.get("format") != FORMAT:
            return True
        listed = decode(Manifest, value, where).files
    except ValueError:
        return False
    return all(_size(join(path, name)) == entry.bytes for name, entry in listed.items())


def _size(path: str) -> int | None:
    """None for a file that is not there."""
    filesystem, file = filesystem_of(path)
    with reading(path):
        try:
            return filesystem.info(file)["size"]
        except _MISSING:
            return None
