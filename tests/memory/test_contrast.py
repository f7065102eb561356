"""The contrast with all rows, against loops over them, at any number of workers."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.memory import contrast as contrast_module
from memseg_dist.memory.contrast import Contrast
from memseg_dist.memory.layouts import Regions
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Momentum

NUM_CLASSES, DIM, NUM_SLOTS = 7, 5, 4
MOMENTUM, TEMPERATURE = 0.6, 0.3


def all_regions() -> Regions:
    """Uneven: class 0 has many images, class 3 none."""
    pairs = [(0, image) for image in range(20)]
    pairs += [(c, image) for c in (1, 2, 4, 5, 6) for image in range(c, 14, 3)]
    classes, images = np.array(pairs).T
    return Regions.of_pairs(classes, images, NUM_CLASSES)


def events(step: int, slot: int, regions: Regions, dim: int):
    """One slot's events; rows come back within a step, and some fail the gate."""
    draw = np.random.default_rng([step, slot])
    rows = draw.integers(0, len(regions), draw.integers(0, 7))
    rows = np.append(rows, rows[:2])  # the same image twice in one slot
    vectors = torch.from_numpy(draw.normal(size=(len(rows), dim))).float()
    gate = torch.from_numpy(draw.random(len(rows)) < 0.7)
    return regions.classes[rows], regions.images[rows], vectors, gate


def run_steps(num_steps: int, dim: int = DIM, **options) -> tuple[ShardedRows, Contrast]:
    regions = all_regions()
    bank = ShardedRows(regions, Momentum(MOMENTUM), dim, **options)
    contrast = Contrast(bank)
    for step in range(num_steps):
        for slot in range(NUM_SLOTS):
            if slot % dist.size() == dist.rank():
                classes, images, vectors, gate = events(step, slot, regions, dim)
                ids = np.stack([classes, images], axis=1)
                bank.propose(ids, vectors, Clock(step, slot, NUM_SLOTS), weight=gate)
        bank.commit(Clock(step, num_slots=NUM_SLOTS))
    return bank, contrast


def nce_by_loops(query, class_id, rows, classes) -> torch.Tensor:
    """Eq. 4 for one query, of the set rows and their classes."""

    def similar(row):
        return torch.exp(torch.cosine_similarity(query, row, dim=0) / TEMPERATURE)

    positives = [row for c, row in zip(classes, rows) if c == class_id]
    negatives = sum(similar(row) for c, row in zip(classes, rows) if c != class_id)
    terms = [-torch.log(similar(row) / (similar(row) + negatives)) for row in positives]
    return sum(terms) / len(terms) if terms else 0 * query.sum()


def queries(rank: int, dim: int = DIM):
    """Ranks ask different numbers of questions; rank 1 asks none. Each is of two classes, which may
    be the same one.
    """
    count = 0 if rank == 1 else 9 + rank
    draw = np.random.default_rng(rank)
    values = torch.from_numpy(draw.normal(size=(count, dim))).float().requires_grad_()
    classes, weights = draw.integers(0, NUM_CLASSES, (count, 2)), draw.random((count, 2))
    classes[1::4, 1], weights[::3, 1] = classes[1::4, 0], 0.0
    return values, classes, weights


def _worker(options):
    _, contrast = run_steps(5, **options)
    values, *asked = queries(dist.rank())
    losses = contrast(values, *asked, TEMPERATURE)
    losses.square().sum().backward()
    return losses.detach(), values.grad


@pytest.mark.parametrize("table", ["local", "sharded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_contrast_equals_loops_at_any_number_of_workers(world_size, table, process_pool):
    bank, _ = run_steps(5)
    rows, sizes = bank.set_rows()
    row_classes = np.repeat(np.arange(NUM_CLASSES), sizes)
    assert sizes[3] == 0 and 0 < len(rows) < len(bank.rows)
    results = process_pool(world_size).run(_worker, {"table": table})
    for rank, (found, gradient) in enumerate(results):
        values, *asked = queries(rank)
        losses = torch.stack(
            [
                sum(w * nce_by_loops(q, c, rows, row_classes) for c, w in zip(classes, weights))
                for q, classes, weights in zip(values, *asked)
            ]
            or [values.sum()]
        )[: len(values)]
        losses.square().sum().backward()
        torch.testing.assert_close(found, losses.detach())
        torch.testing.assert_close(gradient, values.grad)


def _by_slot():
    """Loss and gradient of each slot's queries, some of which are none, after some steps."""
    _, contrast = run_steps(5, dim=16)
    found = {}
    for slot in range(dist.rank(), NUM_SLOTS, dist.size()):
        values, *asked = queries(slot, dim=16)
        losses = contrast(values, *asked, TEMPERATURE)
        losses.square().sum().backward()
        found[slot] = losses.detach(), values.grad
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_slot_gets_the_same_bits_at_any_number_of_workers(world_size, process_pool):
    wanted = _by_slot()
    for found in process_pool(world_size).run(_by_slot):
        for slot, (losses, gradient) in found.items():
            assert torch.equal(losses, wanted[slot][0])
            assert gradient is None or torch.equal(gradient, wanted[slot][1])


def _empty_rank():
    regions = Regions.of_pairs(np.zeros(3, int), np.arange(3), 1)
    bank = ShardedRows(regions, Momentum(), DIM)
    contrast = Contrast(bank)
    if dist.rank() == 0:
        ids = np.stack([np.zeros(3, int), np.arange(3)], axis=1)
        bank.propose(ids, torch.eye(3, DIM), Clock(0))
    bank.commit(Clock(0))
    values = torch.ones(2, DIM, requires_grad=True)
    losses = contrast(values, np.zeros((2, 1), int), np.ones((2, 1)), TEMPERATURE)
    losses.sum().backward()
    return len(bank.owned), losses.detach(), values.grad


def test_a_rank_without_classes_and_a_class_without_rivals(process_pool):
    results = process_pool(4).run(_empty_rank)
    assert sorted(owned for owned, *_ in results) == [0, 0, 0, 1]
    for _, losses, gradient in results:  # nothing to tell it from: Eq. 4 is -log 1
        assert losses.tolist() == [0, 0] and (gradient == 0).all()


def test_a_class_that_never_passed_the_gate_costs_nothing():
    regions = all_regions()
    bank = ShardedRows(regions, Momentum(), DIM)
    contrast = Contrast(bank)
    ids = np.flatnonzero(regions.classes < 2)
    gate = torch.from_numpy(regions.classes[ids] == 0)
    vectors = torch.randn(len(ids), DIM)
    pairs = np.stack([regions.classes[ids], regions.images[ids]], axis=1)
    bank.propose(pairs, vectors, Clock(0), weight=gate)
    bank.commit(Clock(0))
    assert bank.per_class().rows.tolist() == [20, 0, 0, 0, 0, 0, 0]
    assert bank.summary(1)["coverage"] == pytest.approx(1 / 6)
    values = torch.randn(3, DIM, requires_grad=True)
    losses = contrast(values, np.array([[1], [3], [0]]), np.ones((3, 1)), TEMPERATURE)
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0] and torch.isfinite(values.grad).all()


def test_many_queries_go_in_chunks(monkeypatch):
    bank, contrast = run_steps(3)
    whole = contrast(*queries(0), TEMPERATURE)
    monkeypatch.setattr(contrast_module, "SCORES_PER_CHUNK", 2 * len(bank.layout))
    torch.testing.assert_close(contrast(*queries(0), TEMPERATURE), whole)


def test_a_mixture_is_two_products_with_the_memory():
    bank, contrast = run_steps(3)
    values, *asked = queries(0)
    with FlopCounterMode(display=False) as counter:
        contrast(values, *asked, TEMPERATURE).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * len(values) * len(bank.rows) * DIM
