"""Every layout under every rule, against a dictionary of rows, on one to four ranks."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from memory.digest import digest_of
from reference import memory as reference
from torch.utils._python_dispatch import TorchDispatchMode

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.memory.contrast import Contrast
from memseg_dist.memory.layouts import Layout, OnePerClass, Regions, Rings
from memseg_dist.memory.means import ClassMeans
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Maximum, Momentum, Overwrite, Rule, WeightedMean, poly

NUM_CLASSES, CAPACITY, DIM, NUM_SLOTS, NUM_STEPS = 7, 3, 5, 5, 6
PAIRS = [(0, image) for image in range(9)]
PAIRS += [(c, image) for c in (1, 2, 5) for image in range(c, 12, 3)]
"""Uneven; classes 3, 4 and 6 have no image."""

LAYOUTS = ("rings", "rings of some", "one", "images")
RULES = ("overwrite", "momentum", "annealed momentum", "maximum", "maximum, filled", "mean", "poly")
CASES = [(one, other) for one in LAYOUTS for other in RULES]
CASES = [case for case in CASES if case[1] != "maximum, filled" or case[0] == "images"]
SPREAD = [
    ("rings", "overwrite"),
    ("rings", "mean"),
    ("rings of some", "momentum"),
    ("one", "poly"),
    ("one", "maximum"),
    ("images", "annealed momentum"),
    ("images", "maximum, filled"),
]
"""What several ranks try: each layout and each rule."""


def layout(name: str) -> Layout:
    if name == "images":
        return Regions.of_pairs(*np.array(PAIRS).T, NUM_CLASSES)
    if name == "one":
        return OnePerClass(NUM_CLASSES)
    return Rings(NUM_CLASSES, CAPACITY, np.array([1, 2, 4]) if name == "rings of some" else None)


def rule(name: str) -> Rule:
    if name.startswith("maximum"):
        return Maximum(fill_from=3 if name.endswith("filled") else None)
    return {
        "overwrite": Overwrite(),
        "momentum": Momentum(0.6),
        "annealed momentum": Momentum(poly(0.8)),
        "mean": WeightedMean(0.3),
        "poly": WeightedMean(poly(0.9)),
    }[name]


def slow_memory(layout_name: str, rule_name: str) -> reference.Memory:
    slow_rule = {
        "overwrite": reference.overwrite,
        "momentum": reference.momentum(lambda clock: 0.6),
        "annealed momentum": reference.momentum(reference.annealed(0.8)),
        "mean": reference.weighted_mean(lambda clock: 0.3),
        "poly": reference.weighted_mean(reference.annealed(0.9)),
    }.get(rule_name, reference.maximum)
    fill_from = 3 if rule_name == "maximum, filled" else None
    if layout_name == "images":
        return reference.Memory(slow_rule, PAIRS, None, fill_from)
    keys = [1, 2, 4] if layout_name == "rings of some" else range(NUM_CLASSES)
    return reference.Memory(slow_rule, keys, 1 if layout_name == "one" else CAPACITY)


def events(step: int, slot: int):
    """Class and image ids, values, weights: uneven, repeated, of no row, sometimes none at all.

    Class 2 has more events than its ring has rows, class 6 none; the last slot never has any, and
    one of class 1 always weighs nothing.
    """
    draw = np.random.default_rng([step, slot])
    count = 0 if slot == NUM_SLOTS - 1 else [0, 3, 9, 1][(step + slot) % 4]
    classes, images = draw.integers(0, 6, count), draw.integers(0, 12, count)
    if slot == 2:
        classes = np.append(classes, [2, 2, 2, 2, 2, 1])
        images = np.append(images, [2, 5, 2, 5, 2, 4])
    values = torch.from_numpy(draw.normal(size=(len(classes), DIM))).float()
    weight = torch.from_numpy(draw.choice([0, 0.5, 1, 1.7], len(classes))).float()
    if slot == 2:
        weight[-1] = 0
    return classes, images, values, weight


def clock_at(step: int, slot: int = 0, idle: bool = False) -> Clock:
    return Clock(step, slot, NUM_SLOTS, idle=idle, num_steps=NUM_STEPS)


def feed(bank: ShardedRows, start: int, stop: int) -> None:
    for step in range(start, stop):
        for slot in reversed(range(dist.rank(), NUM_SLOTS, dist.size())):  # in any order
            classes, images, values, weight = events(step, slot)
            ids = classes
            if bank.layout.num_ids == 2:
                ids = np.stack([classes, images], axis=1)
            at = clock_at(step, slot)
            bank.propose(ids, values + 1, at, weight=1 - weight)
            bank.propose(ids, values, at, weight=weight)  # activations recomputed: replaces
            bank.propose(ids, values + 2, clock_at(step, slot, idle=True))
        bank.commit(clock_at(step))


def expected(case) -> reference.Memory:
    memory = slow_memory(*case)
    for step in range(NUM_STEPS):
        of_step = []
        for slot in range(NUM_SLOTS):
            columns = [column.tolist() for column in events(step, slot)[:2]]
            for row, event in enumerate(zip(*columns, *events(step, slot)[2:])):
                of_step.append((slot, row, *event))
        memory.step(of_step, clock_at(step))
    return memory


def gathered(part: torch.Tensor, table: str) -> torch.Tensor:
    if table == "local":
        return part.clone()
    counts = dist.all_gather(torch.tensor([len(part)])).flatten().tolist()
    return dist.all_gather_ragged(part.clone(), counts)


def look_at(bank: ShardedRows) -> dict:
    found = {name: gathered(getattr(bank, name), bank.table) for name in ("rows", "origin")}
    found |= {"updates": gathered(bank.updates, bank.table), "digest": digest_of(bank, values=True)}
    found |= {"per_class": bank.per_class(), "summary": bank.summary(NUM_STEPS)}
    if isinstance(bank.layout, Rings):
        found |= {"means": bank.reads[0].means, "counts": bank.reads[0].counts}
    found["lengths"] = gathered(bank.reads[-1].lengths, bank.table)
    return found


def new_bank(case, table: str) -> ShardedRows:
    bank = ShardedRows(layout(case[0]), rule(case[1]), DIM, table=table)
    if isinstance(bank.layout, Rings):
        ClassMeans(bank)
    Contrast(bank)
    return bank


def run_cases(table: str, cases) -> dict:
    found = {}
    for case in cases:
        bank = new_bank(case, table)
        feed(bank, 0, NUM_STEPS)
        found[case] = look_at(bank)
    return found


@pytest.fixture(scope="module")
def alone():
    return run_cases("local", CASES)


def check(found: dict, memory: reference.Memory, keys: dict) -> None:
    """`keys`: the columns that name the rows of the layout."""
    rows = list(zip(*(key.tolist() for key in keys.values())))
    num_set = 0
    for row, key in enumerate(rows):
        assert found["updates"][row] == memory.updates.get(key, 0), key
        origin = memory.origin.get(key, (-1, -1, -1))
        assert tuple(found["origin"][row].tolist()) == origin, key
        if key in memory.rows:
            num_set += 1
            torch.testing.assert_close(found["rows"][row], memory.rows[key])
            torch.testing.assert_close(found["lengths"][row], memory.rows[key].norm())
        else:
            assert not found["rows"][row].any()
    assert num_set == len(memory.rows) > 0
    for class_id in range(NUM_CLASSES):
        own = [key for key in memory.rows if key[0] == class_id]
        per_class = [int(part[class_id]) for part in found["per_class"]]
        last = max((memory.origin[key][0] for key in own), default=-1)
        assert per_class == [len(own), sum(memory.updates[key] for key in own), last]
        if "means" in found:
            mean = torch.stack([memory.rows[key] for key in own]).mean(0) if own else None
            torch.testing.assert_close(
                found["means"][class_id], torch.zeros(DIM) if mean is None else mean
            )
            assert found["counts"][class_id] == len(own)
    stale = [NUM_STEPS - origin[0] for origin in memory.origin.values()]
    has_rows = len({key[0] for key in rows})
    assert found["summary"] == pytest.approx({
        "fill": num_set / len(rows),
        "coverage": len({key[0] for key in memory.rows}) / has_rows,
        "staleness": sum(stale) / len(stale),
        "dropped": memory.dropped,
    })  # fmt: skip


@pytest.mark.parametrize(("world_size", "table"), [(1, "sharded"), (2, "sharded"), (3, "sharded"),
                                                   (4, "sharded"), (2, "local")])  # fmt: skip
def test_every_layout_and_rule_equals_the_loop(world_size, table, alone, process_pool):
    memories = {case: expected(case) for case in CASES}
    assert memories["rings of some", "mean"].dropped and memories["images", "mean"].dropped
    for results in process_pool(world_size).run(
        run_cases, table, CASES if world_size == 1 else SPREAD
    ):
        for case, found in results.items():
            check(found, memories[case], layout(case[0]).keys)
            assert found["digest"] == alone[case]["digest"]


def save_all(stop: int) -> dict:
    saved = {}
    for case in SPREAD:
        bank = new_bank(case, "sharded")
        feed(bank, 0, stop)
        state = bank.state_dict()
        dropped = state.pop("dropped")
        saved[case] = {
            n: (part.start, part.total, part.tensor.clone()) for n, part in state.items()
        }
        saved[case]["dropped"] = (0, 1, dropped)
    return saved


def reader(states: list[dict]):
    """Reads what several ranks saved."""

    def read(name, start=0, stop=None):
        parts = dict(
            sorted((state[name][0], state[name]) for state in states if len(state[name][2]))
        )
        if name == "dropped" or not parts:
            return states[0][name][2]
        whole = torch.cat([part for _, _, part in parts.values()])
        assert all(len(whole) == total for _, total, _ in parts.values())
        return whole[start:stop]

    return read


def resume_all(states: list[dict], start: int) -> dict:
    found = {}
    for case in SPREAD:
        bank = new_bank(case, "sharded")
        classes = np.zeros((1, bank.layout.num_ids), int)
        bank.propose(classes, torch.ones(1, DIM), clock_at(start, NUM_SLOTS))  # forgotten
        bank.load_state_dict(reader([state[case] for state in states]))
        feed(bank, start, NUM_STEPS)
        found[case] = look_at(bank)
    return found


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (3, 4), (4, 2)])
def test_a_state_is_read_at_another_world_size(before, after, alone, process_pool):
    states = process_pool(before).run(save_all, 3)
    for results in process_pool(after).run(resume_all, states, 3):
        for case, found in results.items():
            assert found["digest"] == alone[case]["digest"]
            assert found["summary"] == pytest.approx(alone[case]["summary"])
            for name in ("rows", *(["means", "counts"] if "means" in found else [])):
                torch.testing.assert_close(found[name], alone[case][name])
            is_set = found["updates"] > 0
            torch.testing.assert_close(found["lengths"][is_set], found["rows"][is_set].norm(dim=1))


def test_digests_see_every_write():
    banks = [new_bank(("rings", "overwrite"), "local") for _ in range(3)]
    row = torch.ones(1, DIM)
    for bank, slot in zip(banks, (0, 0, 1)):
        bank.propose([2], row, clock_at(0, slot))
        bank.commit(clock_at(0))
    first, same, moved = banks
    assert digest_of(first) == digest_of(same) != digest_of(moved)
    assert digest_of(first, values=True) == digest_of(same, values=True)
    same.rows[0] += 1
    assert digest_of(first) == digest_of(same)
    assert digest_of(first, values=True) != digest_of(same, values=True)


class NoSync(TorchDispatchMode):
    """Fails for what waits for a device: a value read on the host, or a shape that depends on one.
    What the host decides about its own arrays does not pass here.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        by_mask = name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list)
        masks = [part for part in args[1] if part is not None] if by_mask else []
        waits = name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        assert not waits and all(part.dtype != torch.bool for part in masks), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_nothing_in_a_step_waits_for_the_device(case):
    bank = new_bank(case, "sharded")
    queries = torch.randn(4, DIM, requires_grad=True)
    with NoSync():
        feed(bank, 0, 2)
        bank.reads[-1](queries, np.arange(4)[:, None], np.ones((4, 1)), 0.1).sum().backward()
    with pytest.raises(AssertionError, match=r"nonzero|index"), NoSync():
        bank.set_rows()


def test_weights_of_nothing_leave_no_trace():
    """A sum of weights that is 0 must give no NaN, neither beside others nor alone."""
    bank = ShardedRows(OnePerClass(3), WeightedMean(0.5), DIM)
    means = ClassMeans(bank)
    values = torch.arange(3.0)[:, None].expand(3, DIM)
    for step in range(2):
        at = Clock(step)
        bank.propose([0, 1, 1], values, at, weight=torch.tensor([0.0, 0.5, 0.0]))
        bank.commit(at)
    assert bank.updates.tolist() == [0, 2, 0] and means.counts.tolist() == [0, 1, 0]
    torch.testing.assert_close(means.means[:, 0], torch.tensor([0.0, 2.0, 0.0]))
    bank.propose([1], values[:1], Clock(2), weight=torch.zeros(1))
    bank.commit(Clock(2))
    assert bank.rows.isfinite().all() and bank._rows.isfinite().all()


def test_schedules_run_over_the_whole_run():
    shares = [poly(0.9)(Clock(step, num_steps=100)) for step in range(101)]
    assert shares[0] == pytest.approx(0.9) and shares[100] == pytest.approx(0.009)
    assert shares == sorted(shares, reverse=True)
    assert shares[50] == pytest.approx(0.5**0.9 * 0.891 + 0.009)
    with pytest.raises(ValueError, match=r"needs Clock\.num_steps"):
        poly(0.9)(Clock(3))
    with pytest.raises(ValueError, match=r"keep is 1\.5; it must lie in 0\.\.1"):
        Momentum(1.5)
    with pytest.raises(ValueError, match=r"momentum is -1"):
        WeightedMean(-1)


def test_whole_numbers_keep_their_dtype_and_small_weights():
    """Activation maps are uint8 of two sides, in the memory and on the way to it."""
    bank = ShardedRows(OnePerClass(2), Maximum(), (2, 3), dtype=torch.uint8)
    maps = 100 * torch.rand(3, 2, 3).round() + torch.arange(3.0)[:, None, None]
    bank.propose([1, 1, 0], maps, Clock(0), weight=torch.tensor([0.1, 0.2, 0.0]))
    assert bank._proposals._of_slot[0][1].dtype == torch.uint8
    bank.commit(Clock(0))
    assert bank.rows.dtype == torch.uint8 and bank.updates.tolist() == [0, 2]
    assert torch.equal(bank.rows[1].float(), maps[:2].amax(0)) and not bank.rows[0].any()


def test_a_maximum_below_zero_is_kept():
    bank = ShardedRows(OnePerClass(1), Maximum(), 1)
    for step, value in enumerate((-3.0, -2.0, -5.0)):
        bank.propose([0], torch.full((1, 1), value), Clock(step))
        bank.commit(Clock(step))
    assert bank.rows.item() == -2


def test_bf16_rows_keep_fp32_means():
    bank = ShardedRows(Rings(2, 4), Overwrite(), 3, dtype=torch.bfloat16)
    means = ClassMeans(bank)
    rows = torch.randn(3, 3)
    bank.propose([1, 1, 1], rows, Clock(0))
    bank.commit(Clock(0))
    assert bank.rows.dtype == torch.bfloat16 and means.means.dtype == torch.float32
    torch.testing.assert_close(means.means[1], rows.bfloat16().float().mean(0))


def test_event_means_equal_the_bank_of_all_pixels():
    """Identity of the specification, section 3: a mean of event means is the paper's full bank."""
    events = torch.nn.functional.normalize(torch.randn(20, 6, 8, dtype=torch.float64), dim=-1)
    x = torch.randn(11, 8, dtype=torch.float64)
    full = (x @ events.flatten(0, 1).T).mean(1)
    torch.testing.assert_close(x @ events.mean(1).mean(0), full)


def noisy(class_ids) -> ShardedRows:
    return ShardedRows(Rings(5, 3, np.array(class_ids)), Momentum(0.6), DIM, noise_seed=5)


def test_noise_counts_as_set_and_takes_turns():
    """The released RCA: position after position, blended with the noise that was there."""
    bank = noisy([1, 4])
    means = ClassMeans(bank)
    rows = bank.rows.clone()
    assert bank.is_set.all() and rows.std() > 0.5 and means.counts.tolist() == [0, 3, 0, 0, 3]
    torch.testing.assert_close(means.means[4], rows[3:].mean(0))
    assert torch.equal(rows[3:], noisy([4]).rows), "of the class alone"
    for step in range(4):
        bank.propose([4], torch.ones(1, DIM), Clock(step))
        bank.commit(Clock(step))
        rows[3 + step % 3] = 0.6 * rows[3 + step % 3] + 0.4
    torch.testing.assert_close(bank.rows, rows)


def test_a_read_that_comes_late_is_up_to_date():
    bank = new_bank(("rings", "overwrite"), "sharded")
    feed(bank, 0, 2)
    late = ClassMeans(bank)
    assert late.counts.any() and torch.equal(late.means, bank.reads[0].means)


def test_published_rows(tmp_path):
    bank = ShardedRows(Rings(3, 2), Overwrite(), 4)
    rows = torch.randn(3, 4)
    for step in range(3):
        bank.propose([[2, 0, 2][step]], rows[step : step + 1], Clock(step))
        bank.commit(Clock(step))
    bank.publish(tmp_path, ["a", "b", "c"])
    table = pq.read_table(tmp_path).to_pydict()
    assert table["uid"] == ["a", "c", "c"] and table["position"] == [0, 0, 1]
    assert table["count"] == [1, 2, 2] and table["last_step"] == [1, 0, 2]
    np.testing.assert_allclose(table["vector"], rows[[1, 0, 2]].numpy())
    with pytest.raises(ValueError, match="2 uids for a memory of 3 classes"):
        bank.publish(tmp_path, ["a", "b"])


def _publish(path: str, table: str) -> None:
    bank = new_bank(("images", "momentum"), table)
    feed(bank, 0, 3)
    bank.publish(path, list("abcdefg"))
    dist.barrier()


@pytest.mark.parametrize("table", ["sharded", "local"])
def test_every_row_is_published_once(tmp_path, table, process_pool):
    process_pool(3).run(_publish, str(tmp_path), table)
    bank = new_bank(("images", "momentum"), "local")
    feed(bank, 0, 3)
    table = pq.read_table(tmp_path).sort_by([("uid", "ascending"), ("position", "ascending")])
    rows, sizes = bank.set_rows()
    assert table.num_rows == len(rows) == sum(sizes)
    np.testing.assert_allclose(table.to_pydict()["vector"], rows.numpy(), rtol=1e-6)


def load_into(bank: ShardedRows, saved: ShardedRows) -> None:
    state = {name: getattr(part, "tensor", part) for name, part in saved.state_dict().items()}
    bank.load_state_dict(lambda name, start=0, stop=None: state[name][start:stop])


def test_states_of_other_memories_are_refused():
    def rings(num_classes, capacity, dim):
        return ShardedRows(Rings(num_classes, capacity), Overwrite(), dim)

    more = r"10 rows \(5 class ids, 2 position ids\), this run has 6 rows \(3 class ids.*: \[3, 4\]"
    with pytest.raises(ValueError, match=more):
        load_into(rings(3, 2, 4), rings(5, 2, 4))
    with pytest.raises(ValueError, match=r"3 position ids\), .* number of rows: \[0, 1, 2\]"):
        load_into(rings(3, 2, 4), rings(3, 3, 4))
    with pytest.raises(ValueError, match=r"rows of shape \(6,\), this run wants \(4,\)"):
        load_into(rings(3, 2, 4), rings(3, 2, 6))

    def images(pairs, shape=2):
        regions = Regions.of_pairs(*np.array(pairs).T, NUM_CLASSES)
        return ShardedRows(regions, Maximum(), shape)

    with pytest.raises(ValueError, match=r"20 rows .* 11 image ids.* 19 rows .*rows: \[0\]"):
        load_into(images(PAIRS[1:]), images(PAIRS))
    other = [*PAIRS[:-1], (5, 99)]
    with pytest.raises(ValueError, match=r"12 image ids\); .* number of rows: \[\]: the classes, "):
        load_into(images(other), images(PAIRS))
    with pytest.raises(ValueError, match=r"rows of shape \(3, 3\), this run wants \(5, 5\)"):
        load_into(images(PAIRS, (5, 5)), images(PAIRS, (3, 3)))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="num_classes is 0 and capacity 2: give at least 1"):
        Rings(0, 2)
    with pytest.raises(ValueError, match=r"rows of shape \(4, 0\): every side must be at least 1"):
        ShardedRows(Rings(3, 2), Overwrite(), (4, 0))
    bank = ShardedRows(Rings(3, 2), Overwrite(), 4)
    with pytest.raises(AssertionError):
        bank.propose([3], torch.zeros(1, 4), Clock(0))


@pytest.mark.parametrize("rule", [Overwrite(), Momentum(0.5), Maximum(), WeightedMean(0.5)])
@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_an_event_of_no_positive_weight_is_not_written(rule, weight):
    bank = ShardedRows(OnePerClass(2), rule, 3)
    for step, weights in enumerate(([1.0, weight], [weight, weight])):
        bank.propose([0, 1], torch.ones(2, 3), Clock(step), weight=torch.tensor(weights))
        bank.commit(Clock(step))
    assert bank.updates.tolist() == [1, 0] and bank.rows.tolist() == [[1.0] * 3, [0.0] * 3]


def test_means_of_many_classes_are_read_in_parts(monkeypatch):
    bank = new_bank(("rings", "overwrite"), "sharded")
    feed(bank, 0, 2)
    whole = ClassMeans(bank)
    monkeypatch.setattr("memseg_dist.memory.means.CLASSES", 2)
    parts = ClassMeans(bank)
    assert torch.equal(parts.means, whole.means) and torch.equal(parts.counts, whole.counts)
