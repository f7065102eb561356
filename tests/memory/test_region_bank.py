"""The region memory against loops over dictionaries, at any number of workers."""

import numpy as np
import pytest
import torch

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.memory import contrast as contrast_module
from memseg_dist.memory.region_bank import RegionBank
from memseg_dist.memory.regions import Regions

NUM_CLASSES, DIM, NUM_SLOTS = 7, 5, 4
MOMENTUM, TEMPERATURE = 0.6, 0.3


def all_regions() -> Regions:
    """Uneven: class 0 has many images, class 3 none."""
    pairs = [(0, image) for image in range(20)]
    pairs += [(c, image) for c in (1, 2, 4, 5, 6) for image in range(c, 14, 3)]
    classes, images = np.array(pairs).T
    return Regions.of_pairs(classes, images, NUM_CLASSES)


def events(step: int, slot: int, regions: Regions):
    """One slot's events; rows come back within a step, and some fail the gate."""
    draw = np.random.default_rng([step, slot])
    rows = draw.integers(0, len(regions), draw.integers(0, 7))
    rows = np.append(rows, rows[:2])  # the same image twice in one slot
    vectors = torch.from_numpy(draw.normal(size=(len(rows), DIM))).float()
    gate = torch.from_numpy(draw.random(len(rows)) < 0.7)
    return regions.classes[rows], regions.images[rows], vectors, gate


def run_steps(num_steps: int, **options) -> RegionBank:
    regions = all_regions()
    bank = RegionBank(regions, DIM, momentum=MOMENTUM, **options)
    for step in range(num_steps):
        for slot in range(NUM_SLOTS):
            if slot % dist.size() == dist.rank():
                bank.propose(*events(step, slot, regions), Clock(step, slot, NUM_SLOTS))
        bank.commit(Clock(step, num_slots=NUM_SLOTS))
    return bank


def by_loops(num_steps: int) -> dict:
    """Eq. 3, event after event: (class, image) -> vector."""
    memory: dict = {}
    for step in range(num_steps):
        for slot in range(NUM_SLOTS):
            for class_id, image, vector, passes in zip(*events(step, slot, all_regions())):
                key = (int(class_id), int(image))
                if not passes:
                    continue
                if key not in memory:
                    memory[key] = vector.clone()
                else:
                    memory[key] = MOMENTUM * memory[key] + (1 - MOMENTUM) * vector
    return memory


def nce_by_loops(query, class_id, memory) -> torch.Tensor:
    """Eq. 4 for one query."""

    def similar(row):
        return torch.exp(torch.cosine_similarity(query, row, dim=0) / TEMPERATURE)

    positives = [row for (c, _), row in memory.items() if c == class_id]
    negatives = sum(similar(row) for (c, _), row in memory.items() if c != class_id)
    terms = [-torch.log(similar(row) / (similar(row) + negatives)) for row in positives]
    return sum(terms) / len(terms) if terms else 0 * query.sum()


def queries(rank: int):
    """Ranks ask different numbers of questions; rank 1 asks none."""
    count = 0 if rank == 1 else 9 + rank
    draw = np.random.default_rng(rank)
    values = torch.from_numpy(draw.normal(size=(count, DIM))).float().requires_grad_()
    return values, draw.integers(0, NUM_CLASSES, count)


def gathered_rows(bank: RegionBank) -> torch.Tensor:
    rows = bank.set_rows()[0]
    if bank.table.kind == "local":
        return rows
    return dist.all_gather_ragged(
        rows, dist.all_gather(torch.tensor([len(rows)])).flatten().tolist()
    )


def _worker(options):
    bank = run_steps(5, **options)
    values, classes = queries(dist.rank())
    losses = bank.contrast(values, classes, TEMPERATURE)
    losses.square().sum().backward()
    answers = (losses.detach(), values.grad)
    return {
        "rows": gathered_rows(bank), "digest": bank.digest(), "counts": bank.counts(),
        "answers": answers, "summary": bank.summary(5), "owned": len(bank.owned),
    }  # fmt: skip


@pytest.mark.parametrize("table", ["local", "sharded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bank_and_contrast_equal_loops_at_any_number_of_workers(world_size, table, process_pool):
    memory = by_loops(5)
    expected = torch.stack([memory[key] for key in sorted(memory)])
    alone = _worker({"table": "local"})
    for rank, result in enumerate(process_pool(world_size).run(_worker, {"table": table})):
        torch.testing.assert_close(result["rows"], expected)
        assert result["digest"] == alone["digest"]
        assert result["summary"] == pytest.approx(alone["summary"])
        assert (result["counts"] == alone["counts"]).all() and result["counts"][3] == 0
        values, classes = queries(rank)
        losses = torch.stack(
            [nce_by_loops(q, c, memory) for q, c in zip(values, classes)] or [values.sum()]
        )[: len(values)]
        losses.square().sum().backward()
        torch.testing.assert_close(result["answers"][0], losses.detach())
        torch.testing.assert_close(result["answers"][1], values.grad)


def _empty_rank():
    regions = Regions.of_pairs(np.zeros(3, int), np.arange(3), 1)
    bank = RegionBank(regions, DIM)
    if dist.rank() == 0:
        bank.propose(np.zeros(3, int), np.arange(3), torch.eye(3, DIM), torch.ones(3) > 0, Clock(0))
    bank.commit(Clock(0))
    values = torch.ones(2, DIM, requires_grad=True)
    losses = bank.contrast(values, np.zeros(2, int), TEMPERATURE)
    losses.sum().backward()
    return len(bank.owned), losses.detach(), values.grad


def test_a_rank_without_classes_and_a_class_without_rivals(process_pool):
    results = process_pool(4).run(_empty_rank)
    assert sorted(owned for owned, *_ in results) == [0, 0, 0, 1]
    for _, losses, gradient in results:  # nothing to tell it from: Eq. 4 is -log 1
        assert losses.tolist() == [0, 0] and (gradient == 0).all()


def test_a_class_that_never_passed_the_gate_costs_nothing():
    regions = all_regions()
    bank = RegionBank(regions, DIM)
    ids = np.flatnonzero(regions.classes < 2)
    gate = torch.from_numpy(regions.classes[ids] == 0)
    vectors = torch.randn(len(ids), DIM)
    bank.propose(regions.classes[ids], regions.images[ids], vectors, gate, Clock(0))
    bank.commit(Clock(0))
    assert bank.counts().tolist() == [20, 0, 0, 0, 0, 0, 0]
    assert bank.summary(1)["coverage"] == pytest.approx(1 / 6)
    values = torch.randn(3, DIM, requires_grad=True)
    losses = bank.contrast(values, np.array([1, 3, 0]), TEMPERATURE)
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0] and torch.isfinite(values.grad).all()


def test_many_queries_go_in_chunks(monkeypatch):
    bank = run_steps(3)
    values, classes = queries(0)
    whole = bank.contrast(values, classes, TEMPERATURE)
    monkeypatch.setattr(contrast_module, "SCORES_PER_CHUNK", 2 * len(bank.regions))
    torch.testing.assert_close(bank.contrast(values, classes, TEMPERATURE), whole)


def test_a_ring_takes_turns_and_starts_from_noise():
    """The released memory: position after position, blended with the noise that was there."""
    regions = Regions.of_rings(np.array([1, 4]), 3, NUM_CLASSES)
    bank = RegionBank(regions, DIM, momentum=MOMENTUM, keying="ring", noise=True, seed=5)
    rows = bank.rows.clone()
    assert bank.is_set.all() and rows.std() > 0.5
    pointer = {1: 0, 4: 0}
    for step in range(4):
        draw = np.random.default_rng(step)
        classes = draw.choice([1, 4], 5)
        vectors = torch.from_numpy(draw.normal(size=(5, DIM))).float()
        gate = torch.from_numpy(draw.random(5) < 0.8)
        bank.propose(classes, np.zeros(5, int), vectors, gate, Clock(step))
        bank.commit(Clock(step))
        for class_id, vector, passes in zip(classes.tolist(), vectors, gate):
            if passes:
                row = (0 if class_id == 1 else 3) + pointer[class_id]
                rows[row] = MOMENTUM * rows[row] + (1 - MOMENTUM) * vector
                pointer[class_id] = (pointer[class_id] + 1) % 3
    torch.testing.assert_close(bank.rows, rows)


def test_noise_does_not_depend_on_the_sharding():
    first = RegionBank(Regions.of_rings(np.array([0, 4]), 3, 5), DIM, keying="ring", noise=True)
    second = RegionBank(Regions.of_rings(np.array([4]), 3, 5), DIM, keying="ring", noise=True)
    assert torch.equal(first.rows[3:], second.rows)


def test_an_image_beyond_the_capacity_writes_nothing():
    regions = all_regions()
    bank = RegionBank(regions.cut(2), DIM)
    gate = torch.ones(len(regions)) > 0
    bank.propose(regions.classes, regions.images, torch.ones(len(regions), DIM), gate, Clock(0))
    bank.commit(Clock(0))
    assert bank.counts().tolist() == [2, 2, 2, 0, 2, 2, 2]


def _state(_):
    state = run_steps(4).state_dict()
    return {name: (part.start, part.total, part.tensor.clone()) for name, part in state.items()}


def _restored(saved):
    """Load on these ranks what other ranks saved."""

    def read(name, start=0, stop=None):
        parts = sorted(saved, key=lambda state: state[name][0])
        return torch.cat([state[name][2] for state in parts])[start:stop]

    bank = RegionBank(all_regions(), DIM, momentum=MOMENTUM)
    bank.load_state_dict(read)
    return bank.digest(values=False), gathered_rows(bank)


def test_a_bank_saved_by_two_is_read_by_four_and_one(process_pool):
    saved = process_pool(2).run(_state, None)
    whole = run_steps(4)
    for world_size in (1, 4):
        for digest, rows in process_pool(world_size).run(_restored, saved):
            assert digest == whole.digest()
            assert torch.equal(rows, whole.set_rows()[0])


def test_changed_images_are_refused_on_resume():
    state = {name: part.tensor for name, part in run_steps(1).state_dict().items()}

    def read(name, start=0, stop=None):
        return state[name][start:stop]

    regions = all_regions()
    fewer = Regions.of_pairs(regions.classes[1:], regions.images[1:], NUM_CLASSES)
    with pytest.raises(ValueError, match=r"has 39 .* this run has 38 .*number of images: \[0\]"):
        RegionBank(fewer, DIM).load_state_dict(read)
    with pytest.raises(ValueError, match="5 channels, this run has 6"):
        RegionBank(regions, 6).load_state_dict(read)
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        RegionBank(regions, DIM, momentum=1.5)


def test_publish_and_search(tmp_path):
    from memseg_dist.memory.search import PublishedRows

    bank = run_steps(3)
    bank.publish(tmp_path, [f"uid-{number}" for number in range(NUM_CLASSES)])
    rows = PublishedRows.open(tmp_path)
    np.testing.assert_allclose(rows.vectors, bank.set_rows()[0].numpy())
    assert set(rows.uids) == {f"uid-{c}" for c in range(NUM_CLASSES) if bank.counts()[c]}
