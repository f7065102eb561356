"""The sum of the gradients of all slots of all ranks, the same on any number of ranks.

    gradients = GradientSum(parameters, in_order=True)
    for each slot of this rank:
        loss.backward()
        gradients.add_slot()
    gradients.finish()          # every parameter's .grad is the sum, on every rank

A sum of floating-point numbers depends on its order. In order, it is ((g_0 + g_1) + g_2) + ... over
the slots, which is how one rank accumulates them. Slots are dealt out in turns, so in every round
of backward passes the ranks have neighbouring slots, in the order of the ranks: each rank receives
its part of the weights of all of them and adds them to its part of the sum; `finish` shows all
parts to everyone. A rank sends (W - 1) / W of a gradient per slot that it runs and as much once per
step, an all-reduce twice that per step; beside the slot's gradient it holds 1 / W of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memseg_dist import dist

BUCKET_BYTES = 64 * 2**20
"""Gradients travel in flat buckets of about this size: a tensor at a time would wait for the
network hundreds of times."""


class GradientSum:
    """in_order: add up in the order of the slots; otherwise every rank adds up its own, and the
    ranks' sums are reduced once per step, in no promised order. Nothing is done on one rank.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, in_order: bool) -> None:
        self.in_order = in_order
        self._buckets = _buckets(parameters)
        self._parts: list[Tensor] = []

    def add_slot(self) -> None:
        """Take over the gradient that this rank's parameters have of one slot. Collective."""
        if dist.size() == 1 or not self.in_order:
            return
        for number, bucket in enumerate(self._buckets):
            flat = _flat(bucket, dist.size())
            for parameter in bucket:
                parameter.grad = None
            of_ranks = dist.all_to_all(flat.view(dist.size(), -1))
            if number == len(self._parts):
                self._parts.append(torch.zeros_like(of_ranks[0]))
            for gradient in of_ranks:
                self._parts[number] += gradient

    def finish(self) -> None:
        """Give every parameter the sum as its gradient, zeros where no slot used it. Collective."""
        if dist.size() == 1:
            return
        for number, bucket in enumerate(self._buckets):
            if self.in_order:
                whole = dist.all_gather(self._parts[number]).flatten()
            else:
                whole = dist.all_reduce_sum(_flat(bucket))
            sizes = [parameter.numel() for parameter in bucket]
            for parameter, part in zip(bucket, whole[: sum(sizes)].split(sizes), strict=True):
                # of the parameter's strides, as backward makes them: optimizers round by layout
                parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))
        self._parts.clear()


def _flat(parameters: Sequence[nn.Parameter], multiple: int = 1) -> Tensor:
    """Their gradients one after another, and zeros up to a multiple of so many numbers."""
    gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad for p in parameters]
    padding = -sum(gradient.numel() for gradient in gradients) % multiple
    flat = [gradient.flatten() for gradient in gradients]
    return torch.cat([*flat, flat[0].new_zeros(padding)])


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if sum(other.nbytes for other in buckets[-1]) >= BUCKET_BYTES:
            buckets.append([])
        buckets[-1].append(parameter)
    return buckets
