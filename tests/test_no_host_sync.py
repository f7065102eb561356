"""The detector of host syncs finds all that it promises, planted one by one at every place of a
step, and lets a step without any pass, with the values of the CPU.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from no_host_sync import HostSync, no_host_sync, pretended_device
from torch import nn

from memseg_dist.batch import Batch

NUM_CLASSES, SIZE = 5, 8


def write_by_mask(x):
    y = x.clone()
    y[x[:, 0] > 0] = x[0]


def write_number_by_mask(x):
    x.clone()[x > 0] = 0.0


def write_host_number(x):
    x.clone()[torch.tensor([0]).to(x.device, non_blocking=True)] = torch.tensor(1.0)


def branch(x):
    if (x > 0).any():
        pass


PLANTS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.detach().sum()),
    "int": lambda x: int(x.sum()),
    "if": branch,
    "device number as index": lambda x: x[torch.zeros((), dtype=torch.int64, device=x.device)],
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to cpu, not blocking": lambda x: x.to("cpu", non_blocking=True),
    "copy into a host tensor": lambda x: torch.empty(x.shape).copy_(x),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "asarray": lambda x: np.asarray(x.detach()),
    "print": lambda x: repr(x),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "where with a host number": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "read by mask": lambda x: x[x > 0],
    "write by mask": write_by_mask,
    "write a host number": write_host_number,
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.abs().long().flatten().bincount(),
    "repeat_interleave": lambda x: x.flatten().repeat_interleave((x > 0).long().flatten()),
    "inverse": lambda x: torch.eye(3, device=x.device).inverse(),
    "to": lambda x: torch.ones(3).to(x.device),
    "pinned to": lambda x: torch.ones(3).pin_memory().to(x.device),
    "to its like": lambda x: torch.ones(3).to(x),
    "from_numpy": lambda x: torch.from_numpy(np.ones(3)).to(x.device),
    "copy from a host tensor": lambda x: torch.empty_like(x).copy_(torch.ones(x.shape)),
    "tensor": lambda x: torch.tensor(1.0, device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device=x.device),
    "new_tensor": lambda x: x.new_tensor(float("-inf")),
    "list as index": lambda x: x[[0, 1]],
    "numpy as index": lambda x: x[np.array([0, 1])],
    "host tensor as index": lambda x: x[torch.tensor([0, 1])],
}

ALLOWED = {
    "full": lambda x: torch.full((2,), 3.0, device=x.device),
    "new_full": lambda x: x.new_full((2,), float("-inf")),
    "to": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "pinned to": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "copy_": lambda x: torch.empty_like(x).copy_(torch.ones(x.shape), non_blocking=True),
    "device index": lambda x: x[torch.arange(2, device=x.device)],
    "device index of columns": lambda x: x[:, torch.arange(2, device=x.device)],
    "write by index": lambda x: x.clone().index_fill_(0, torch.arange(2, device=x.device), 1.0),
    "slices": lambda x: x[1:, None, ..., 0],
    "write a number by mask": write_number_by_mask,  # torch makes it a masked_fill
    "masked_fill": lambda x: x.masked_fill(x > 0, 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "host number": lambda x: x * torch.tensor(2.0),
    "repeat_interleave": lambda x: x[:2].repeat_interleave(
        torch.arange(2, device=x.device), dim=0, output_size=1
    ),
    "one_hot": lambda x: F.one_hot(torch.arange(3, device=x.device), 4),
    "host to host": lambda x: torch.tensor([1, 2]).tolist(),
    "host mask": lambda x: torch.arange(3)[torch.tensor([True, False, True])],
    "numbers of the host": lambda x: float(np.ones(3).sum()) + x.shape[0],
}


class Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plant):
        ctx.plant = plant
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.plant(gradient)
        return gradient, None


class PlantedSGD(torch.optim.SGD):
    def __init__(self, parameters, plant):
        super().__init__(parameters, lr=0.1, momentum=0.9, foreach=True)
        self.plant = plant

    def step(self):
        super().step()
        self.plant(self.param_groups[0]["params"][0])


class Toy(nn.Module):
    """What methods and backbones are made of, one of each, and a memory of a row per class."""

    def __init__(self, plants, device="cpu"):
        super().__init__()
        self.plants = plants
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.0))
        self.classes = nn.Embedding(NUM_CLASSES, 4)
        self.memory = torch.zeros(NUM_CLASSES, 4, device=device)

    def forward(self, batch):
        features = F.relu(self.stem(batch.images / 255), inplace=True)
        with torch.autocast(features.device.type, enabled=False):
            x_BLD = features.flatten(2).mT
            x_BLD = F.scaled_dot_product_attention(x_BLD, x_BLD, x_BLD)
            x_BLD = Planted.apply(x_BLD, self.plants["backward"])
            self.plants["forward"](x_BLD[0])
            ids = np.array([labels[0] for labels in batch.labels])
            self.ids = torch.from_numpy(ids).to(x_BLD.device, non_blocking=True)
            score_BL = torch.einsum("bld,bd->bl", x_BLD, self.classes(self.ids))
            score_BL = score_BL.masked_fill(~batch.valid.flatten(1), float("-inf"))
            best = score_BL.topk(3, dim=1)
            grid = torch.full((2, 3, 3, 2), 0.1, device=x_BLD.device)
            sampled = F.grid_sample(features, grid, align_corners=False)
            enlarged = F.interpolate(features, scale_factor=2, mode="bilinear")
            self.rows = x_BLD.gather(1, best.indices[..., None].expand(-1, -1, 4)).mean(1)
            pooled = x_BLD.new_full((NUM_CLASSES, 4), 0.0)
            pooled = pooled.scatter_reduce(0, self.ids[:, None].expand(-1, 4), self.rows, "sum")
            pooled = pooled.index_put((self.ids,), self.rows, accumulate=True)
            return best.values.mean() + sampled.mean() + enlarged.std() + pooled.square().sum()

    @torch.no_grad()
    def after_step(self):
        self.memory.index_put_((self.ids,), self.rows)
        self.plants["after_step"](self.memory)


def toy_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    valid = torch.rand(2, SIZE, SIZE, generator=generator) > 0.2
    return Batch(images, valid, None, ((1, 2), (3,)), "toy", "labels", ("a", "b"))


PLACES = ("forward", "backward", "optimizer", "after_step")


def toy_step(device, plant=lambda x: None, place=""):
    """One step with `plant` at `place`: the loss, the gradients, the memory and the parameters."""
    torch.manual_seed(0)
    plants = {name: plant if name == place else lambda x: None for name in PLACES}
    toy, batch = Toy(plants, device).to(device), toy_batch().to(device)
    optimizer = PlantedSGD(toy.parameters(), plants["optimizer"])
    with no_host_sync():
        loss = toy(batch)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in toy.parameters()]
        optimizer.step()
        toy.after_step()
    return [loss, *gradients, toy.memory, *toy.state_dict().values()]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_a_planted_sync_is_found_wherever_it_stands(plant, place):
    with pretended_device() as device, pytest.raises(HostSync, match=r"test_no_host_sync\.py:\d+"):
        toy_step(device, plant, place)


@pytest.mark.parametrize("place", PLACES)
def test_a_step_without_a_sync_passes(place):
    def plant(x):
        for allowed in ALLOWED.values():
            allowed(x.detach())

    with pretended_device() as device:
        toy_step(device, plant, place)


def test_values_and_gradients_are_those_of_the_cpu():
    expected = toy_step("cpu")
    with pretended_device() as device:
        found = toy_step(device)
        assert all(tensor.device == device for tensor in found)
        found = [tensor.cpu() for tensor in found]
    assert len(found) == len(expected)
    torch.testing.assert_close(found, expected)


def test_a_sync_is_allowed_outside():
    with pretended_device() as device:
        x = torch.tensor([[1.0, 2.0]], device=device)
        assert (x.tolist(), x.sum().item(), x[x > 1].shape) == ([[1.0, 2.0]], 3.0, (1,))
        with pytest.raises(RuntimeError, match="mixes tensors of the host and of the device"):
            x + torch.ones(2)
    assert torch.tensor([1.0]).item() == 1.0
