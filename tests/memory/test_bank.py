"""The bank against one written with lists, on 1, 2 and 4 ranks."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.memory.bank import Bank
from memseg_dist.memory.ring import ring_positions

NUM_CLASSES, CAPACITY, DIM, NUM_SLOTS = 7, 3, 5, 4


def proposals(step: int, slot: int) -> tuple[list[int], torch.Tensor]:
    """Uneven, repeated, sometimes empty; class 6 is never seen, class 2 floods its ring."""
    generator = torch.Generator().manual_seed(100 * step + slot)
    count = [0, 3, 8, 1][(step + slot) % 4]
    ids = torch.randint(0, NUM_CLASSES - 1, (count,), generator=generator).tolist()
    if slot == 2:
        ids += [2] * 5
    return ids, torch.randn(len(ids), DIM, generator=generator)


def by_lists(num_steps: int) -> dict[int, list[torch.Tensor]]:
    rings: dict[int, list[torch.Tensor]] = {k: [] for k in range(NUM_CLASSES)}
    for step in range(num_steps):
        for slot in range(NUM_SLOTS):
            for class_id, row in zip(*proposals(step, slot)):
                rings[class_id] = [*rings[class_id], row][-CAPACITY:]
    return rings


def feed(bank: Bank, start: int, stop: int) -> None:
    for step in range(start, stop):
        slots = range(dist.rank(), NUM_SLOTS, dist.size())
        for slot in reversed(slots):  # any order of proposing gives the same bank
            ids, rows = proposals(step, slot)
            clock = Clock(step, slot, NUM_SLOTS)
            bank.propose(ids, rows + 1, clock)
            bank.propose(ids, rows, clock)  # activations recomputed: replaces
            bank.propose([0], torch.ones(1, DIM), Clock(step, slot, NUM_SLOTS, idle=True))
        bank.commit(Clock(step))


def run_bank(table: str, num_steps: int, resume_at: int | None = None):
    bank = Bank(NUM_CLASSES, CAPACITY, DIM, table=table)
    feed(bank, 0, resume_at or num_steps)
    if resume_at:
        state = bank.state_dict()
        whole = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                whole[name] = value.clone()
            else:
                parts = dist.all_gather_object((value.start, value.tensor.clone()))
                whole[name] = torch.cat([part for _, part in dict(parts).items()]) if (
                    table == "sharded") else value.tensor.clone()  # fmt: skip
        bank = Bank(NUM_CLASSES, CAPACITY, DIM, table="sharded")
        bank.load_state_dict(lambda name, start=0, stop=None: whole[name][start:stop])
        feed(bank, resume_at, num_steps)
    summary = bank.summary(num_steps)
    return bank.means, bank.counts, bank.digest(), bank.digest(values=True), summary


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("table", ["local", "sharded"])
def test_bank_equals_lists_at_any_world_size(process_pool, world_size, table):
    rings = by_lists(6)
    expected_digests = run_bank("local", 6)[2:4]
    for means, counts, digest, full_digest, _ in process_pool(world_size).run(run_bank, table, 6):
        assert counts.tolist() == [len(ring) for ring in rings.values()]
        for class_id, ring in rings.items():
            expected = torch.stack(ring).mean(0) if ring else torch.zeros(DIM)
            torch.testing.assert_close(means[class_id], expected)
        assert (digest, full_digest) == expected_digests


def test_state_loads_at_another_world_size(process_pool):
    expected = run_bank("local", 6)
    for world_size in (1, 2, 4):
        for result in process_pool(world_size).run(run_bank, "sharded", 6, 3):
            assert torch.equal(result[0], expected[0])
            assert result[2:4] == expected[2:4]


def test_summary_counts_fill_coverage_and_staleness():
    bank = Bank(4, 2, 3)
    assert bank.summary(0) == {"fill": 0.0, "coverage": 0.0, "staleness": 0.0}
    bank.propose([0, 0, 0, 2], torch.zeros(4, 3), Clock(5))
    bank.commit(Clock(5))
    assert bank.summary(8) == {"fill": 3 / 8, "coverage": 0.5, "staleness": 3.0}


def test_event_means_equal_the_bank_of_all_pixels():
    """Identity of the specification, section 3: a mean of event means is the paper's full bank."""
    events = torch.nn.functional.normalize(torch.randn(20, 6, 8, dtype=torch.float64), dim=-1)
    x = torch.randn(11, 8, dtype=torch.float64)
    full = (x @ events.flatten(0, 1).T).mean(1)
    torch.testing.assert_close(x @ events.mean(1).mean(0), full)


def test_ring_positions_wrap_and_drop_what_is_overwritten():
    class_E = np.array([1, 0, 1, 1, 0, 1])
    position, survives = ring_positions(class_E, np.array([5, 2]), capacity=3)
    assert position.tolist() == [2, 2, 0, 1, 0, 2]
    assert survives.tolist() == [False, True, True, True, True, True]


def test_bf16_rows_keep_fp32_means():
    bank = Bank(2, 4, 3, dtype=torch.bfloat16)
    rows = torch.randn(3, 3)
    bank.propose([1, 1, 1], rows, Clock(0))
    bank.commit(Clock(0))
    assert bank.means.dtype == torch.float32
    torch.testing.assert_close(bank.means[1], rows.bfloat16().float().mean(0))


def test_published_rows(tmp_path):
    bank = Bank(3, 2, 4)
    rows = torch.randn(3, 4)
    bank.propose([2, 0, 2], rows, Clock(7))
    bank.commit(Clock(7))
    bank.publish(tmp_path, ["a", "b", "c"])
    table = pq.read_table(tmp_path).to_pydict()
    assert table["uid"] == ["a", "c", "c"]
    assert table["slot"] == [0, 0, 1]
    assert table["count"] == [1, 2, 2]
    assert table["last_step"] == [7, 7, 7]
    np.testing.assert_allclose(table["vector"], rows[[1, 0, 2]].numpy())


def test_state_of_another_label_space_is_refused():
    bank, other = Bank(3, 2, 4), Bank(5, 2, 4)
    state = {k: getattr(v, "tensor", v) for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"saved bank has 5 classes, this run has 3"):
        bank.load_state_dict(lambda name, start=0, stop=None: state[name][start:stop])
    wide = Bank(3, 2, 6)
    state = {k: getattr(v, "tensor", v) for k, v in wide.state_dict().items()}
    with pytest.raises(ValueError, match="6 channels per class, this run wants 2 of 4"):
        bank.load_state_dict(lambda name, start=0, stop=None: state[name][start:stop])


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        Bank(0, 2, 4)
