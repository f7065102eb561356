"""Eight verbs over `torch.distributed`, identities in a single process.

Tensors travel on the process group's backend of their device: NCCL for CUDA tensors, gloo for CPU
tensors. With the backend "cpu:gloo,cuda:nccl" host-side sizes are exchanged without touching the
GPU. Every verb is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

T = TypeVar("T")

ROLL_CALL_S = 5.0
"""How far apart ranks that wait in the same collective give up, at most."""


def size() -> int:
    return torch_dist.get_world_size() if _is_running() else 1


def rank() -> int:
    return torch_dist.get_rank() if _is_running() else 0


def barrier() -> None:
    if size() > 1:
        torch_dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, written into `tensor` and returned."""
    if size() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """[n, ...] of equal shape on every rank -> [W, n, ...], in rank order."""
    if size() == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(size())]
    torch_dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def all_to_all(tensor: Tensor) -> Tensor:
    """[W, n, ...]: part r goes to rank r -> [W, n, ...]: part r came from rank r."""
    if size() == 1:
        return tensor
    received = torch.empty_like(tensor)
    torch_dist.all_to_all_single(received, tensor.contiguous())
    return received


def all_gather_ragged(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """[sizes[rank], ...] -> [sum(sizes), ...], in rank order; `sizes` is known to every rank."""
    assert tensor.shape[0] == sizes[rank()], f"{tensor.shape[0]} rows, announced {sizes[rank()]}"
    if size() == 1 or sum(sizes) == 0:
        return tensor
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = all_gather(padded)
    return torch.cat([part[:count] for part, count in zip(parts, sizes, strict=True)])


def all_gather_object(value: T) -> list[T]:
    """Small picklable host values of every rank, in rank order. Not for the training step."""
    if size() == 1:
        return [value]
    values: list[T | None] = [None] * size()
    torch_dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@contextmanager
def naming_absent_ranks() -> Iterator[None]:
    """Within, an error of a collective that timed out names the ranks that did not come to it.

    All ranks that did come give up at about the same time, one by its timeout, the others since
    that one closes its connections, and say so in the group's store. The rest are absent.
    """
    try:
        yield
    except RuntimeError as error:
        absent = _absent_ranks(str(error)) if size() > 1 else []
        if not absent:
            raise
        who = f"worker{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
        raise RuntimeError(
            f"{who} did not come to a collective for which the others waited as long as "
            "launch.timeout_s allows: look at what hangs there, or raise --launch.timeout-s"
        ) from error


def _absent_ranks(error: str) -> list[int]:
    """Empty unless it was a timeout, here or elsewhere."""
    try:
        return _call_the_roll(error)
    except RuntimeError:  # the store is gone, with the rank that held it: the error says more
        return []


def _call_the_roll(error: str) -> list[int]:
    store = torch_dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=ROLL_CALL_S))
    store.set(f"failed/{rank()}", "")
    if re.search("time(d )?out", error, re.IGNORECASE):
        store.set("timed out", "")
    else:
        time.sleep(1.0)  # for the rank whose timeout this error may come from
        if not store.check(["timed out"]):
            return []
    deadline = time.monotonic() + ROLL_CALL_S
    while absent := [r for r in range(size()) if not store.check([f"failed/{r}"])]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return absent


def _is_running() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()
