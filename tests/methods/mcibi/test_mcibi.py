"""MCIBI's whole step against nested loops; its memory, presets, bad input and use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from methods.patches import Patches
from reference import mcibi as reference

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.methods.mcibi.config import MCIBIConfig, paper, released
from memseg_dist.methods.mcibi.memory import FeatureMemory
from memseg_dist.methods.mcibi.method import MCIBI

SIZE, GRID, DIM, NUM_CLASSES, NUM_STEPS = 8, 4, 6, 5, 12
SMALL = MCIBIConfig(dim=DIM, dropout=0.0, stages=(-2, -1), aux_heads=(0,), consistency_epochs=0.5)
EPOCH = 4


def build(config=SMALL, classes=range(NUM_CLASSES), training=True) -> MCIBI:
    torch.manual_seed(0)
    method = MCIBI(
        Twice(7, SIZE // GRID, torch.float64), config, classes={"masks": np.array(classes)},
        num_classes=NUM_CLASSES, epoch_steps=EPOCH if training else None,
    )  # fmt: skip
    if method.memory is not None:
        for bank in method.state().values():
            bank._rows, bank._proposals.empty = bank._rows.double(), bank._proposals.empty.double()
    return method.double()


def batch(step: int, slot: int, per_slot: int = 2) -> Batch:
    """Class 4 is in no mask, class 3 from step 2 on; the first image of slot 1 has no labels."""
    draw = torch.Generator().manual_seed(100 * step + slot)
    shape = (per_slot, SIZE, SIZE)
    images = torch.randint(0, 256, (per_slot, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    masks = torch.randint(-1, 3 if step < 2 else 4, shape, generator=draw)
    if slot == 1:
        masks[0] = IGNORE
    keys = tuple(f"{step}-{slot}-{i}" for i in range(per_slot))
    valid = torch.ones(shape, dtype=torch.bool)
    return Batch(images, valid, masks, ((),) * per_slot, "masks", "masks", keys)


class Twice(Patches):
    """Two stages of one map, so that there can be two auxiliary heads."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.stages *= 2

    def forward(self, images, valid=None):
        return super().forward(images) * 2


class ByLoops:
    """Eq. 1 - 19 over the slots of a step, with the layers of `method`."""

    def __init__(self, method: MCIBI) -> None:
        self.method, self.config = method, method.config
        self.memory: dict[int, torch.Tensor] = {}

    def step(self, step: int, num_slots: int, per_slot: int) -> dict[str, torch.Tensor]:
        config, net = self.config, self.method.net
        total: dict[str, torch.Tensor] = {}
        maps, targets = [], []
        for slot in range(num_slots):
            item = batch(step, slot, per_slot)
            features, _ = self.method.backbone(item.images)
            pixels = net.reduce(features)
            logits = net.dataset.classify(pixels)
            codes = torch.stack([reference.gathered(one, self.memory, DIM) for one in logits])
            attention = net.dataset.attention
            parts = zip(attention.query(pixels), attention.key(codes), attention.value(codes))
            context = attention.out(torch.stack([reference.attended(*part) for part in parts]))
            fused = net.dataset.fuse(torch.cat([pixels, context], dim=1))
            divide_by = config.seg_denominator
            losses = {
                "seg": reference.pixel_loss(net.classify(fused), item.masks, divide_by),
                "distribution": config.distribution_weight
                * reference.pixel_loss(logits, item.masks, divide_by),
                "aux": config.aux_weight
                * sum(
                    reference.pixel_loss(head(features), item.masks, divide_by)
                    for head in net.auxiliary
                ),
            }
            if step >= round(config.consistency_epochs * EPOCH) and self.memory:
                rows = {
                    k: net.classify(m[None, :, None, None], by_running_statistics=True)[0, :, 0, 0]
                    for k, m in self.memory.items()
                }
                loss = reference.consistency_loss(rows)
                losses["consistency"] = config.consistency_weight * loss
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss / num_slots
            maps += [*pixels.detach()]
            targets += [*item.masks]
        self._update(maps, targets, step)
        return total

    def _update(self, maps, targets, step: int) -> None:
        config = self.config
        momentum = reference.momentum_at(
            step, NUM_STEPS, config.momentum, config.momentum_power, config.momentum_floor
        )
        before = dict(self.memory)
        for k in range(NUM_CLASSES):
            pairs = reference.class_weights_and_pixels(maps, targets, before, k, config.weighting)
            if pairs:
                new = reference.transform(pairs)
                is_first = k not in before
                self.memory[k] = new if is_first else reference.updated(before[k], new, momentum)


def run_step(method: MCIBI, step: int, num_slots: int, per_slot: int = 2):
    """One global step on one process, as the loop does it: mean losses, gradients added up."""
    total: dict[str, torch.Tensor] = {}
    for slot in range(num_slots):
        clock = Clock(step, slot, num_slots, num_steps=NUM_STEPS)
        losses = method(batch(step, slot, per_slot), clock)
        (sum(losses.values()) / num_slots).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach() / num_slots
    method.after_step(Clock(step, num_slots=num_slots, num_steps=NUM_STEPS))
    return total


OTHER = {
    "weighting": "plain", "seg_denominator": "all", "aux_heads": (0, 1), "aux_weight": 0.3,
    "distribution_weight": 0.7, "consistency_weight": 0.2, "momentum": 0.6, "momentum_power": 2.0,
    "momentum_floor": 0.3, "transform_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "num_slots", "per_slot"), [({}, 1, 3), (OTHER, 2, 2)])
def test_whole_steps_equal_the_loops(changes, num_slots, per_slot):
    """Losses, gradients and memory; classes that are absent, come later, or never come."""
    method = build(replace(SMALL, **changes))
    layers = changes.get("transform_layers", 2)
    assert len(method.net.dataset.attention.query) == layers
    slow, parameters = ByLoops(method), list(method.parameters())
    for step in range(4):
        expected = slow.step(step, num_slots, per_slot)
        wanted = torch.autograd.grad(sum(expected.values()), parameters, allow_unused=True)
        losses = run_step(method, step, num_slots, per_slot)
        assert set(losses) == set(expected)
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name].detach(), rtol=1e-9, atol=1e-9)
        for parameter, gradient in zip(parameters, wanted):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)
            parameter.grad = None
        assert set(slow.memory) == set(range(3 if step < 2 else 4))
        assert method.net.is_set.tolist() == [k in slow.memory for k in range(NUM_CLASSES)]
        for k, vector in slow.memory.items():
            torch.testing.assert_close(method.net.codes[k], vector, rtol=1e-9, atol=1e-9)
    assert "consistency" in losses and not method.net.codes[4].any()


def test_a_class_outside_the_sources_vocabulary_is_ignored():
    """The label space has classes of other sources; the masks may show what the source excludes."""
    method = build(classes=(0, 2))
    losses = run_step(method, 0, 1)
    assert method.net.is_set.tolist() == [True, False, True, False, False]
    other = build(classes=(0, 2))
    shown = batch(0, 0)
    hidden = replace(shown, masks=torch.where(shown.masks == 1, IGNORE, shown.masks))
    for name, loss in other(hidden, Clock(0, num_steps=NUM_STEPS)).items():
        torch.testing.assert_close(loss.detach(), losses[name])


def test_the_loss_of_a_slot_without_labels_is_zero():
    item = batch(0, 0)
    item = replace(item, masks=torch.full_like(item.masks, IGNORE))
    method = build()
    losses = method(item, Clock(0, num_steps=NUM_STEPS))
    assert all(loss == 0 for loss in losses.values())
    method.after_step(Clock(0, num_steps=NUM_STEPS))
    assert not method.net.is_set.any()


# ---------------------------------------------------------------- memory


def test_momentum_follows_the_paper_or_stays():
    for schedule, at in (("poly", reference.momentum_at), ("constant", lambda *_: 0.9)):
        memory = FeatureMemory(replace(SMALL, momentum_schedule=schedule), 3, 2, "cpu")
        found = [memory.schedule(Clock(t, num_steps=NUM_STEPS)) for t in range(NUM_STEPS + 1)]
        assert found == pytest.approx([at(t, NUM_STEPS) for t in range(NUM_STEPS + 1)])


def feature_step(memory: FeatureMemory, step: int, slots) -> None:
    for slot, (pixels, target) in enumerate(slots):
        memory.propose(pixels, target, Clock(step, slot, len(slots), num_steps=NUM_STEPS))
    memory.commit(Clock(step, 0, len(slots), num_steps=NUM_STEPS))


def test_a_class_on_one_slot_of_many_moves_as_far_as_on_all():
    """The official code averages the banks of its GPUs instead."""
    torch.manual_seed(0)
    first, second = (torch.randn(1, 4, 2, 2) for _ in range(2))
    here, nowhere = torch.zeros(1, 4, 4, dtype=torch.int64), torch.full((1, 4, 4), IGNORE)
    found = []
    for slots in ([(second, here)], [(second, nowhere), (second, here), (second, nowhere)]):
        memory = FeatureMemory(SMALL, 2, 4, "cpu")
        feature_step(memory, 0, [(first, here)])
        feature_step(memory, 1, slots)
        found.append(memory.rows.rows.clone())
    torch.testing.assert_close(*found)


def test_first_vectors_by_mean_and_by_pixel():
    pixels, target = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    target[0, 2:] = 1
    for kind, allowed in (("mean", [{3.5}, {11.5}]), ("pixel", [set(range(8)), set(range(8, 16))])):
        memory = FeatureMemory(replace(SMALL, first_vector=kind), 3, 1, "cpu")
        feature_step(memory, 0, [(pixels, target)])
        assert memory.rows.is_set.tolist() == [True, True, False]
        values = memory.rows.rows[:2, 0].tolist()
        assert all(value in one for value, one in zip(values, allowed, strict=True))


def test_a_clustered_first_vector_is_of_the_largest_cluster():
    """Three in four pixels of class 0 point one way; class 1 is shown once, class 2 never."""
    config = replace(SMALL, first_vector="cluster", first_steps=6)
    memory = FeatureMemory(config, 3, 2, "cpu")
    torch.manual_seed(0)
    for step in range(6):
        slots = []
        for slot in range(4):
            direction = torch.tensor([0.0, 5.0]) if slot == 3 else torch.tensor([2.0, 0.0])
            pixels = direction.view(1, 2, 1, 1) + 0.01 * torch.randn(1, 2, 3, 3)
            target = torch.zeros(1, 3, 3, dtype=torch.int64)
            if step == slot == 0:
                target[0, 0] = 1
            slots.append((pixels, target))
        assert not memory.rows.is_set.any()
        feature_step(memory, step, slots)
    assert memory.rows.is_set.tolist() == [True, True, False]
    vector = memory.rows.rows[0]
    torch.testing.assert_close(vector / vector.norm(), torch.tensor([1.0, 0.0]), atol=0.1, rtol=0)
    mean = memory.first_pixels.rows[: 6 * 4].norm(dim=1).mean()  # of all its pixels
    torch.testing.assert_close(vector.norm(), mean)
    feature_step(memory, 6, slots)
    assert memory.rows.updates.tolist() == [5, 1, 0]


# ---------------------------------------------------------------- presets


def test_the_paper_and_its_code_as_presets():
    text, code = paper(), released()
    assert (text.dim, text.aux_heads, text.transform_layers) == (512, (), 1)
    assert paper(MCIBIConfig(context="ocr")).aux_heads == (-2,)
    assert (text.first_vector, text.context_fusion, text.seg_denominator) == (
        "pixel", "concat", "all",
    )  # fmt: skip
    assert text.consistency_epochs == 0 and code.consistency_epochs == 2
    assert (code.consistency_norm, code.first_vector, code.dim) == ("batch", "mean", 512)
    for preset in (text, code):
        assert (preset.momentum, preset.distribution_weight, preset.consistency_weight) == (
            0.9, 0.4, 1.0,
        )  # fmt: skip


# ---------------------------------------------------------------- use


def test_vectors_are_weights_of_the_model_and_serve_without_a_memory():
    method = build()
    for step in range(3):
        run_step(method, step, 1)
    alone = build(training=False)
    assert alone.memory is None and alone.state() == {}
    alone.load_state_dict(method.state_dict())
    images = batch(5, 0).images
    one, other = (m.eval().predict(images, torch.arange(NUM_CLASSES)) for m in (method, alone))
    assert torch.equal(one.dense(), other.dense())
    ids, vectors = alone.class_vectors()
    assert ids.tolist() == [0, 1, 2, 3] and vectors.shape == (4, DIM)
    assert set(alone.maps(images, [0, 1])) == {"O", "W", "cosine with M"}


def test_a_plain_segmenter_has_no_memory_and_shows_none():
    method = build(replace(SMALL, memory="off"))
    losses = run_step(method, 0, 1)
    assert set(losses) == {"seg", "aux"}
    assert method.class_vectors() is None and method.charts() == {}
    assert set(method.maps(batch(0, 0).images, [0, 1])) == {"O"}


def test_figures_of_the_memory():
    method = build()
    run_step(method, 0, 2)
    figures = method.summary(Clock(0, num_steps=NUM_STEPS))
    assert figures["memory/momentum"] == pytest.approx(0.9)
    assert figures["memory/coverage"] == pytest.approx(3 / 5)
    (chart,) = method.charts().values()
    assert chart.tolist() == [2, 2, 2, 0, 0]  # slots
