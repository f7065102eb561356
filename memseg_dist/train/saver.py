"""Writes checkpoints while training goes on: a step waits for the copy to the host alone.

    saver.start(step, engine, memories)     # collective; back once the state is copied
    ...                                     # steps, while a thread of every rank writes
    path = saver.settle()                   # collective, at every step: the path once it is whole

Every rank's thread writes and hashes its files; when all have, rank 0's thread writes the manifest.
The threads call no collective: what they have come to is asked at step boundaries, and an error of
one is raised there on every rank. A run that is killed in between goes on from the checkpoint
before. One checkpoint is in flight at a time; it costs the host of each rank one copy of what that
rank writes (rank 0: the weights and the optimizer's state), until it is whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.config import RunConfig
from memseg_dist.data.files import filesystem_of, is_url, join
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.jsonable import encode
from memseg_dist.memory.state import Rows, Stateful
from memseg_dist.train.checkpoint import FORMAT, MANIFEST, Part, survey
from memseg_dist.train.engine import Engine
from memseg_dist.train.storage import (
    make_empty,
    on_rank_0,
    rename,
    together,
    write_json,
    write_tensors,
)

POLL_S = 0.02
"""How often the ranks that wait for a checkpoint ask each other how far it is."""
log = logging.getLogger(__name__)

Files = dict[str, dict[str, Any]]
"""Of each file its {"sha256", "bytes"}."""


@dataclass
class _Flight:
    """The checkpoint that is being written. work: this rank's share of the present phase."""

    target: str
    commit: Callable[[Files], None]
    work: Future[Files | None]
    is_committing: bool = False


class Saver:
    """The checkpoints of one run under `directory`, of which the newest `keep` stay.

    data: `TrainLoader.fingerprints`.
    """

    def __init__(
        self,
        directory: str,
        config: RunConfig,
        label_space: LabelSpace,
        data: Mapping[str, str],
        keep: int,
    ) -> None:
        self._directory, self._keep = directory, keep
        self._run = {
            "config": encode(config),
            "label_space": label_space.to_json(),
            "data": {**data},
        }
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._flight: _Flight | None = None

    def start(self, step: int, engine: Engine, memories: Mapping[str, Stateful]) -> None:
        """Copy the state after `step` steps and begin to write it. Collective.

        The one before must have been settled.
        """
        assert self._flight is None, "settle(wait=True) comes first"
        directory, keep = self._directory, self._keep
        target = join(directory, f"step-{step:08d}")
        scratch = target if is_url(directory) else f"{target}.tmp"
        on_rank_0(lambda: make_empty(scratch))
        tensors: dict[str, Mapping[str, Tensor]] = {}
        parts = {}
        for name, memory in sorted(memories.items()):
            tensors[_memory_file(name)], parts[name] = _divide(name, memory.state_dict())
        state = engine.state()
        is_first = dist.rank() == 0
        if is_first:
            tensors |= {
                "model.safetensors": state.weights,
                "optimizer.safetensors": state.optimizer,
            }

        def write() -> Files:
            written = {
                name: write_tensors(scratch, name, content)
                for name, content in tensors.items()
                if content or not name.startswith("memory-")
            }
            if is_first:
                written["run.json"] = write_json(scratch, "run.json", {"step": step, **self._run})
            return written

        def commit(files: Files) -> None:
            manifest = {"format": FORMAT, "step": step, "files": files, "memories": parts}
            write_json(scratch, MANIFEST, manifest)
            if scratch != target:
                rename(scratch, target)
            _tidy(directory, keep, target)

        self._flight = _Flight(target, commit, self._thread.submit(write))

    def settle(self, wait: bool = False) -> str | None:
        """The path of the checkpoint in flight if it has become whole, else None. Collective.

        wait: until it is. ValueError, on every rank, if one could not write.
        """
        while (flight := self._flight) is not None:
            while _on_any_rank(not flight.work.done()):
                if not wait:
                    return None
                time.sleep(POLL_S)  # no rank waits in a collective for as long as writing takes
            self._flight = None  # whatever became of it
            written = together(flight.work.result)
            if flight.is_committing:
                return flight.target
            files = {name: entry for own in written if own for name, entry in own.items()}
            share = flight.commit if dist.rank() == 0 else _nothing
            work: Future[Files | None] = self._thread.submit(share, files)
            self._flight = _Flight(flight.target, flight.commit, work, is_committing=True)
        return None


def _on_any_rank(flag: bool) -> bool:
    return bool(dist.all_reduce_sum(torch.tensor(int(flag))) > 0)


def _nothing(files: Files) -> None:
    """What the other ranks do while rank 0 writes the manifest."""


def _divide(name: str, state: Mapping[str, Rows | Tensor]) -> tuple[dict[str, Tensor], dict]:
    """Copies of this rank's tensors to write, and which file holds which rows of each. Collective.

    Ranks that hold the same rows write them once; what all hold alike is rank 0's to write.
    """
    layout = {
        key: (value.start, value.start + len(value.tensor)) if isinstance(value, Rows) else (-1, -1)
        for key, value in state.items()
    }
    layouts = dist.all_gather_object(layout)
    own: dict[str, Tensor] = {}
    parts: dict[str, list[Part]] = {}
    for key, value in state.items():
        seen: set[tuple[int, int]] = set()
        parts[key] = []
        for rank, ranges in enumerate(layouts):
            start, stop = ranges[key]
            is_only_chance = rank == len(layouts) - 1 and not parts[key]
            if (start, stop) in seen or (start == stop >= 0 and not is_only_chance):
                continue
            seen.add((start, stop))
            parts[key].append((_memory_file(name, rank), start, stop))
            if rank == dist.rank():
                held = value.tensor if isinstance(value, Rows) else value
                own[key] = held.detach().to("cpu", copy=True)
        parts[key].sort(key=lambda part: part[1])
    return own, parts


def _memory_file(name: str, rank: int | None = None) -> str:
    rank = dist.rank() if rank is None else rank
    return f"memory-{name}-{rank:05d}-of-{dist.size():05d}.safetensors"


def _tidy(directory: str, keep: int, newest: str) -> None:
    """Delete all whole checkpoints but the last, and what killed processes left half written.

    newest: has just been written and stays. A store that fails ends no run: what is left is deleted
    with the next checkpoint.
    """
    try:
        checkpoints = survey(directory)
        whole = [path for path, is_whole in checkpoints.items() if is_whole]
        for path in checkpoints.keys() - {newest, *whole[-keep:]}:
            if path not in whole:
                log.warning("deleting the incomplete checkpoint %s", path)
            filesystem, remote = filesystem_of(path)
            manifest = join(remote, MANIFEST)
            if filesystem.exists(manifest):
                filesystem.rm_file(manifest)  # first: a half-deleted one is not whole
            filesystem.rm(remote, recursive=True)
    except Exception as error:  # noqa: BLE001 - object stores have errors of their own
        log.warning("cannot delete old checkpoints of %s: %s", directory, error)
