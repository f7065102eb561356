"""What the whole rests on: the core imports alone, seeds are stable, verbs agree."""

import subprocess
import sys

import pytest
import torch

from memseg_dist import dist
from memseg_dist.batch import Batch, Clock, derive_seed

PLATFORMS = ("ray", "deepspeed", "mlflow", "webdataset")
CORE = ("batch", "dist", "memory.contrast", "memory.kmeans", "memory.means", "methods.kinds",
        "methods.larvseg.method", "methods.rca.method", "nn.backbone")  # fmt: skip


def test_core_imports_without_the_platforms():
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in PLATFORMS)
    imports = "; ".join(f"import memseg_dist.{name}" for name in CORE)
    code = f"import sys; {blocked}{imports}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_seeds_are_pure_and_told_apart():
    assert derive_seed(0, "augment", 1) == 5043833245539238708
    assert len({derive_seed(0, "a", 1), derive_seed(0, "a", "1"), derive_seed(0, "a1")}) == 3
    assert Clock(3, 1, seed=5).seed_for("forward") != Clock(3, 2, seed=5).seed_for("forward")


def test_batch_moves_all_its_tensors():
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    batch = Batch(images, images[:, 0].bool(), images[:, 0].long(), ((),), "s", "masks", ("k",))
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.valid.device.type, moved.masks.device.type} == {"meta"}


def test_a_label_given_twice_is_refused():
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"image 1 of a batch of 's' has the labels \(3, 3\)"):
        Batch(images, images[:, 0].bool(), None, ((3,), (3, 3)), "s", "labels", ("a", "b"))


def verbs():
    rank, size = dist.rank(), dist.size()
    ragged = dist.all_gather_ragged(torch.full((rank, 2), rank), list(range(size)))
    return (
        dist.all_reduce_sum(torch.tensor([rank + 1.0])).item(),
        dist.all_gather(torch.tensor([rank])).flatten().tolist(),
        ragged[:, 0].tolist(),
        dist.all_gather_object({"rank": rank}),
    )


def test_verbs_on_one_and_four_ranks(process_pool):
    assert verbs() == (1.0, [0], [], [{"rank": 0}])
    for result in process_pool(4).run(verbs):
        expected = (10.0, [0, 1, 2, 3], [1, 2, 2, 3, 3, 3], [{"rank": r} for r in range(4)])
        assert result == expected
