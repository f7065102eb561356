"""Batches for training.

A global step is all S slots, each a micro-batch of one source; they are dealt out to the ranks in
turns, so that every rank gets the same mix of sources. What a slot holds at a step is a pure
function of (sources, seed, step, slot): not of the rank, the number of workers or of loader
processes, and not of where a run was interrupted.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from memseg_dist.batch import Batch, Clock, derive_seed
from memseg_dist.data.cache import DEFAULT_CACHE_BYTES
from memseg_dist.data.evalset import EvalDataset, EvalItem
from memseg_dist.data.files import default_cache, join
from memseg_dist.data.loader_process import (
    TIMEOUT_S,
    next_item,
    process_options,
    starting_loader_processes,
)
from memseg_dist.data.order import BlockedOrder, Draw, repeat_factors
from memseg_dist.data.source import Source, SourceReader
from memseg_dist.data.vocabulary import LabelSpace

__all__ = ["EvalDataset", "EvalItem", "SlotPlan", "Source", "TrainLoader", "slots_of"]


class SlotPlan(NamedTuple):
    """A slot that a rank runs; idle = a repeat with weight 0 that keeps the collectives in step."""

    slot: int
    idle: bool


def slots_of(rank: int, world_size: int, num_slots: int) -> list[SlotPlan]:
    """Rank's slots: every `world_size`-th, ceil(num_slots / world_size) of them on every rank.

    So the ranks run neighbouring slots at a time, in the order of the ranks (`train.gradients`).
    """
    if world_size > num_slots:
        raise ValueError(
            f"{world_size} workers for {num_slots} slots: every worker needs at least one slot; "
            f"run at most {num_slots} workers or give the sources more slots"
        )
    assert 0 <= rank < world_size
    plans = [SlotPlan(slot, False) for slot in range(rank, num_slots, world_size)]
    longest = -(-num_slots // world_size)
    return plans + [SlotPlan(rank, True)] * (longest - len(plans))


class _Request(NamedTuple):
    """A batch to make: all that a loader process needs to know."""

    source: int
    draws: list[Draw]


class _Requests(Sampler[_Request]):
    """The requests of `slots` at the steps in `span`, drawn as they are needed."""

    def __init__(self, readers: Sequence[SourceReader], seed: int, slots: Sequence[int]) -> None:
        self.slots = slots
        self.span = range(0)
        self._sources = [reader.source for reader in readers]
        # Per slot: its source, and which of that source's slots it is.
        self._places = [(n, slot) for n, s in enumerate(self._sources) for slot in range(s.slots)]
        own = Counter(self._places[slot][0] for slot in slots)
        self._orders = [_order(reader, seed, own[n]) for n, reader in enumerate(readers)]

    def __iter__(self) -> Iterator[_Request]:
        for step in self.span:
            for slot in self.slots:
                yield self.request(step, slot)

    def request(self, step: int, slot: int) -> _Request:
        number, own_slot = self._places[slot]
        source, order = self._sources[number], self._orders[number]
        batch = source.batch_per_slot
        return _Request(number, order.slot_samples(step, own_slot, source.slots, batch))

    def __len__(self) -> int:
        return len(self.span) * len(self.slots)


def _order(reader: SourceReader, seed: int, own_slots: int) -> BlockedOrder:
    source, index = reader.source, reader.index
    share = source.repeat_threshold
    repeats = None if share is None else repeat_factors(index, reader.kept_ids, share)
    order_seed = derive_seed(seed, "order", source.name)
    order = BlockedOrder(index.shard_sizes, order_seed, source.group, repeats, own_slots)
    if len(order) < source.slots:
        raise ValueError(
            f"source {source.name!r} at {source.path}: {len(order)} samples cannot fill "
            f"{source.slots} slots; give it fewer slots"
        )
    return order


class _Batches(Dataset[Batch]):
    """Indexed by _Request, not by a number."""

    def __init__(self, readers: list[SourceReader]) -> None:
        self._readers = readers

    def __getitem__(self, request: _Request) -> Batch:
        return self._readers[request.source].batch(request.draws)


class TrainLoader:
    """This rank's micro-batches, step by step.

    num_processes: loader processes of this rank, 0 = load in this one. prefetch: batches that each
    of them keeps ready. timeout_s: how long one of their batches is waited for. cache_bytes bounds
    the machine's copy of remote shards; local paths are read in place.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        label_space: LabelSpace,
        *,
        seed: int,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        num_processes: int = 0,
        prefetch: int = 2,
        timeout_s: float = TIMEOUT_S,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        names = [source.name for source in sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"sources {names}: at least one is needed, each with its own name")
        self.sources = tuple(sources)
        self.seed = seed
        self.plan = slots_of(rank, world_size, self.num_slots)
        cache = Path(cache_dir or default_cache())
        readers = [SourceReader(item, label_space, seed, cache, cache_bytes) for item in sources]
        self._readers = readers
        own_slots = [slot for slot, idle in self.plan if not idle]
        # It does not know this loader: a cycle would delay the end of the loader processes.
        self._requests = _Requests(readers, seed, own_slots)
        self._loader: DataLoader[Batch] = DataLoader(
            _Batches(readers),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_unchanged,
            persistent_workers=num_processes > 0,
            prefetch_factor=prefetch if num_processes else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or each pass would draw from the global one
            **process_options(num_processes, timeout_s),
        )

    @property
    def num_slots(self) -> int:
        return sum(source.slots for source in self.sources)

    def fingerprints(self) -> dict[str, str]:
        """Of the samples and the pseudo masks of each source; a second for 13M samples."""
        return {part: of for reader in self._readers for part, of in reader.fingerprints().items()}

    def steps(self, start_step: int, stop_step: int) -> Iterator[list[tuple[Batch, Clock]]]:
        """This rank's micro-batches of steps [start_step, stop_step).

        stop_step: the last of the run, which the clocks tell. An idle slot comes last and is its
        batch again. One iterator at a time. ValueError naming what hangs if a batch does not come.
        """
        self._requests.span = range(start_step, stop_step)
        with starting_loader_processes(self._loader.num_workers):
            batches = iter(self._loader)
        for step in range(start_step, stop_step):
            made = {
                slot: next_item(batches, functools.partial(self._name, step, slot))
                for slot in self._requests.slots
            }
            yield [
                (made[slot], Clock(step, slot, self.num_slots, idle, self.seed, stop_step))
                for slot, idle in self.plan
            ]

    def _name(self, step: int, slot: int) -> str:
        request = self._requests.request(step, slot)
        index = self._readers[request.source].index
        rows = [index.row(draw.row) for draw in request.draws]
        shards, keys = sorted({join(index.root, row.shard) for row in rows}), [r.key for r in rows]
        return f"the samples {keys} of {', '.join(shards)} (step {step}, slot {slot})"


def _unchanged(batch: Any) -> Any:
    return batch
