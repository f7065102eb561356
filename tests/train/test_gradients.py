"""The sum of the slots' gradients: its order is that of the slots, whoever ran them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memseg_dist import dist
from memseg_dist.data.loader import slots_of
from memseg_dist.train import gradients
from memseg_dist.train.gradients import GradientSum

NUM_SLOTS = 5
SHAPES = [(3, 5), (7,), (), (2, 2)]


def slot_gradients(slot: int) -> list[torch.Tensor | None]:
    """Of sizes that make their sum depend on the order; a slot does not use some parameters."""
    generator = torch.Generator().manual_seed(slot)
    values = [torch.randn(shape, generator=generator) * 10.0 ** (slot % 3) for shape in SHAPES]
    return [None if index == slot % 3 else value for index, value in enumerate(values)]


def total(in_order: bool, bucket_bytes: int) -> list[torch.Tensor]:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    parameters[3] = nn.Parameter(torch.zeros(SHAPES[3]).T)  # as channels_last: of other strides
    gradients.BUCKET_BYTES = bucket_bytes
    whole = GradientSum(parameters, in_order=in_order)
    for _ in range(2):  # steps: nothing is left of the first
        for parameter in parameters:
            parameter.grad = None
        for slot, idle in slots_of(dist.rank(), dist.size(), NUM_SLOTS):
            for parameter, gradient in zip(parameters, slot_gradients(slot), strict=True):
                if gradient is not None:
                    share = gradient * (0.0 if idle else 1.0)
                    parameter.grad = share if parameter.grad is None else parameter.grad + share
            whole.add_slot()
        whole.finish()
    return [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_sum_is_that_of_one_worker_bit_by_bit(process_pool, size, bucket_bytes):
    wanted = total(True, bucket_bytes)
    for found in process_pool(size).run(total, True, bucket_bytes):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert found[3].stride() == (1, 2)


def test_out_of_order_it_is_the_sum_to_rounding(process_pool):
    wanted = total(True, 2**20)
    for found in process_pool(2).run(total, False, 2**20):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
