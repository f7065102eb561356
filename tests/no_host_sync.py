"""A pretended accelerator: a step that would make the host wait for a GPU fails without a GPU.

    with pretended_device() as device:
        method, batch = build(device=device).to(device), batch.to(device)
        with no_host_sync():
            sum(method(batch, clock).values()).backward()     # HostSync if anything here waits

A pretended tensor is a CPU tensor that says it lives on another device. All operations on it run on
the CPU, so values and gradients are right and host code (numpy, Python numbers) works as usual.
Inside `no_host_sync` an operation raises `HostSync` where a GPU would make the host wait:

- values are read: `item`, `float`, `bool`, `tolist`, `numpy`, `cpu`, `to("cpu")`, `equal`, `print`;
- the size of a result depends on values: `nonzero`, `where` with one argument, boolean indices,
  `masked_select`, `unique`, `bincount`, `repeat_interleave` without `output_size`;
- a copy from the host blocks: `to(device)` without `non_blocking`, `torch.tensor(x, device=...)`,
  `as_tensor`, `new_tensor`, indices that are lists or lie on the host.

This holds for forward, backward, optimizers and memories, in whatever place the operation stands.
A host tensor of one or more dimensions beside a pretended one is a RuntimeError, as on a GPU.

It cannot see: waits within a GPU's own kernels, `torch.cuda.synchronize` and streams, collectives,
kernels of other packages, and branches on `device.type == "cuda"`. Autocast casts nothing here;
fused optimizers and activation checkpointing refuse the device. It is stricter than a GPU in one
thing: a copy to the host that does not block is found, too, since whoever reads it has to wait.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE_TYPE = "lazy"
"""A type of device that torch knows, that needs no driver and that nothing else here uses."""
WAITS = {
    "_linalg_check_errors", "_local_scalar_dense", "_unique", "_unique2", "allclose", "bincount",
    "equal", "histc", "masked_select", "nonzero", "unique_consecutive", "unique_dim",
    "unique_dim_consecutive",
}  # fmt: skip
"""Operations that wait for the device whatever their arguments are."""
INDEXING = {
    "_index_put_impl_",
    "_unsafe_index",
    "_unsafe_index_put",
    "index",
    "index_put",
    "index_put_",
}
MATH = 0
"""The answer of `_fused_sdp_choice` that has attention written out in single operations."""

_is_forbidden = False


class HostSync(AssertionError):
    """Here the host would wait for the device."""


class PretendedTensor(Tensor):
    """The CPU tensor `inner`, as if it lived on the pretended device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        layout = (inner.shape, inner.stride(), inner.storage_offset())
        device = torch.device(DEVICE_TYPE, 0)
        tensor = cls._make_wrapper_subclass(cls, *layout, dtype=inner.dtype, device=device)
        tensor.inner = inner
        return tensor

    def numpy(self, **kwargs: Any) -> Any:
        raise HostSync(f"numpy, in {_where()}")  # a GPU's tensor refuses, too, forbidden or not

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees the operations without a pretended argument, which may make a pretended tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Checks an operation, runs it on the CPU and pretends of its results what they should be."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    device = kwargs.get("device") or (pretended or tensors or [torch.empty(())])[0].device
    if name == "is_pinned":
        return False
    if name == "_pin_memory":
        return args[0].clone()
    if name == "_fused_sdp_choice" and pretended:
        return MATH
    if name == "_to_copy":
        _check_copy(args[0].device, device, kwargs.get("non_blocking", False))
    elif name == "copy_":
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        device = args[0].device
        _check_copy(args[1].device, device, non_blocking)
    elif pretended:
        _check(name, kwargs, tensors, args)

    def unwrap(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf.inner if isinstance(leaf, PretendedTensor) else leaf

    in_place = {id(tensor.inner): tensor for tensor in pretended}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = in_place.get(id(leaf))
        # a pretended tensor keeps its shape: what reshapes it in place gives another one
        return (
            tensor if tensor is not None and tensor.shape == leaf.shape else PretendedTensor(leaf)
        )

    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    return tree_map(wrap, result) if device.type == DEVICE_TYPE else result


def _check_copy(source: torch.device, target: torch.device, non_blocking: bool) -> None:
    if source.type == DEVICE_TYPE and target.type == "cpu":
        _wait("a copy to the host")
    if source.type == "cpu" and target.type == DEVICE_TYPE and not non_blocking:
        _wait("a copy from the host that blocks")


def _check(name: str, kwargs: dict[str, Any], tensors: list[Tensor], args: tuple) -> None:
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    indices = [index for index in args[1] if index is not None] if name in INDEXING else []
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        _wait(f"{name} by a boolean mask")
    if (name in INDEXING or name == "where") and on_host:  # even one number is copied
        _wait(f"{name} with an argument on the host")
    elif any(tensor.ndim for tensor in on_host):
        raise RuntimeError(f"{name} mixes tensors of the host and of the device, in {_where()}")
    if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _wait(name)


def _wait(what: str) -> None:
    if _is_forbidden:
        raise HostSync(f"{what}, in {_where()}")


def _where() -> str:
    """The innermost line that is neither torch's nor this file's."""
    hidden = (__file__, os.path.dirname(torch.__file__))
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(hidden)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.amp.autocast:
    """torch's own refuses the type of device; the CPU's does nothing to pretended tensors."""
    return torch.amp.autocast("cpu" if device_type == DEVICE_TYPE else device_type, *args, **kwargs)


@contextlib.contextmanager
def pretended_device() -> Iterator[torch.device]:
    """The device. Modules and tensors can be made on it and moved to it until the context ends."""
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(x, device=...)` shows its copy
    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` keeps its parameters
    try:
        with mock.patch("torch.autocast", _autocast), _Factories():
            yield torch.device(DEVICE_TYPE, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """HostSync for everything that waits for the pretended device."""
    global _is_forbidden
    _is_forbidden = True
    try:
        yield
    finally:
        _is_forbidden = False
