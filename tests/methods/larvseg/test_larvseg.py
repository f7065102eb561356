"""LarvSeg against the long computation of the paper, value and gradient, and each flag's effect."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from methods.contract import MethodContract
from methods.patches import Patches
from reference import larvseg as reference

from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.data.source import Source
from memseg_dist.methods.larvseg.classifier import CosineClassifier
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.methods.larvseg.method import LarvSeg
from memseg_dist.methods.setup import Setup
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.load_model import load_model

NUM_CLASSES, DIM, SIZE, GRID = 9, 12, 64, 8
SETTINGS = LarvSegConfig(
    cls_weight=1, aux_weight=1, capacity=3, top_k=5, warm_up=2,
    peak_threshold=0.1, distance_threshold=1.5,
)  # fmt: skip


def build(config=SETTINGS, dtype=torch.float32, classes=None, **options) -> LarvSeg:
    torch.manual_seed(0)
    classes = classes or {"masks": np.arange(NUM_CLASSES), "weak": np.arange(NUM_CLASSES)}
    classifier = CosineClassifier(NUM_CLASSES, DIM).to(dtype)
    return LarvSeg(
        Patches(DIM, SIZE // GRID, dtype), classifier, config, classes=classes, **options
    )


def batch(supervision: str, labels, seed: int, source: str | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    valid = torch.ones(count, SIZE, SIZE, dtype=torch.bool)
    valid[0, :, SIZE // 2 :] = False
    masks = None
    if supervision == "masks":
        masks = torch.randint(-1, NUM_CLASSES, (count, SIZE, SIZE), generator=generator)
    return Batch(
        images, valid, masks, tuple(map(tuple, labels)), source or
        {"masks": "masks", "labels": "weak"}[supervision], supervision, ("key",) * count,
    )  # fmt: skip


def weak_batch(step: int) -> Batch:
    """Two multi-label images and two single-label ones; the classes come back, so memories warm
    up.
    """
    draw = np.random.default_rng(step)
    labels = [
        draw.choice(NUM_CLASSES, 3, replace=False),
        draw.choice(NUM_CLASSES, 2, replace=False),
    ]
    labels += [draw.choice(NUM_CLASSES, 1), draw.choice(NUM_CLASSES, 1)]
    return batch("labels", [sorted(map(int, ids)) for ids in labels], step)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_losses_and_gradients_equal_the_paper_over_a_run(dtype, tolerance, monkeypatch):
    if dtype == torch.float64:  # the method computes in fp32: let it compute in fp64 here
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    method = build(dtype=dtype)
    method.memory.read.means = method.memory.read.means.to(dtype)
    method.memory.rows._rows = method.memory.rows._rows.to(dtype)
    proposals = method.memory.rows._proposals
    proposals.empty = proposals.empty.to(dtype)
    memory = reference.PixelMemory(SETTINGS.capacity)
    parameters = list(method.parameters())
    num_aux = 0
    for step in range(8):
        masks, weak = batch("masks", [(), ()], step), weak_batch(step)
        clock = Clock(step, slot=1, num_slots=2)
        got = {**method(masks, Clock(step, num_slots=2)), **method(weak, clock)}

        weight = method.classifier.class_weights(torch.arange(NUM_CLASSES))
        x_seg = method.classifier.embed(*method.backbone(masks.images))
        x = method.classifier.embed(*method.backbone(weak.images))
        gamma = method.classifier.gamma
        valid = weak.valid[:, ::2, ::2]
        valid_positions = weak.valid[:, :: SIZE // GRID, :: SIZE // GRID].flatten(1)
        seg = reference.seg_loss(x_seg, weight, gamma, masks.masks[:, ::2, ::2], (GRID, GRID))
        cls, aux = reference.weak_losses(
            x, weight, gamma, [list(ids) for ids in weak.labels], valid, valid_positions,
            (GRID, GRID), memory, warm_up=SETTINGS.warm_up,
            peak_threshold=SETTINGS.peak_threshold, distance_threshold=SETTINGS.distance_threshold,
        )  # fmt: skip
        expected = {"seg": seg, "cls": cls, "aux": aux}
        num_aux += bool(aux != 0)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=tolerance, msg=name)
            for one, other in zip(
                torch.autograd.grad(got[name], parameters, retain_graph=True, allow_unused=True),
                torch.autograd.grad(
                    expected[name], parameters, retain_graph=True, allow_unused=True
                ),
            ):
                one = torch.zeros(()) if one is None else one
                other = torch.zeros_like(one) if other is None else other
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)

        method.after_step(clock)
        for x_LD, ids, valid_L in zip(x.detach(), weak.labels, valid_positions):
            for class_id in ids:
                score = x_LD @ weight[class_id].detach()
                event = reference.top_pixels(x_LD, score, valid_L, SETTINGS.top_k)
                memory.enqueue(class_id, event)
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.05 * torch.randn_like(parameter)
    assert num_aux >= 5, "the memory never warmed up: nothing was compared"
    assert method.memory.read.counts.max() == SETTINGS.capacity


@pytest.mark.parametrize("denominator", ["valid", "all"])
def test_a_crop_of_any_size_is_one_that_was_padded(denominator):
    """Of 59 pixels, of which L_seg reads every second: 8 whole positions of 8, as evaluation
    enlarges them. Three losses and the memory.
    """
    found = []
    for size in (SIZE, 59):
        method = build(dataclasses.replace(SETTINGS, seg_denominator=denominator, warm_up=1))
        for step in range(2):
            batches = []
            for item in (batch("masks", [(), ()], step), weak_batch(step)):
                item.images[..., 59:, :] = item.images[..., 59:] = 0
                item.valid[:, 59:] = item.valid[..., 59:] = False
                if item.masks is not None:
                    item.masks[:, 59:] = item.masks[..., 59:] = IGNORE
                cut = {
                    name: None if part is None else part[..., :size, :size]
                    for name in ("images", "valid", "masks")
                    for part in [getattr(item, name)]
                }
                batches.append(dataclasses.replace(item, **cut))
            clock = Clock(step)
            losses = {name: loss for item in batches for name, loss in method(item, clock).items()}
            method.after_step(clock)
        assert losses["aux"] > 0
        found.append({**losses, "memory": method.memory.read.means})
    if denominator == "all":  # by 32 x 32 pixels, or by the 30 x 30 of the crop
        found[0]["seg"] = found[0]["seg"] * 32**2 / 30**2
    torch.testing.assert_close(found[1], found[0])


def test_cold_memory_gives_no_auxiliary_loss_and_the_baseline_has_none():
    losses = build()(weak_batch(0), Clock(0))
    assert losses["aux"].item() == 0
    baseline = build(dataclasses.replace(SETTINGS, attention="off"))
    torch.testing.assert_close(baseline(weak_batch(0), Clock(0))["cls"], losses["cls"])
    assert "aux" not in baseline(weak_batch(0), Clock(0))
    assert baseline.state() == {}


def test_the_single_image_design_equals_the_long_computation():
    method = build(dataclasses.replace(SETTINGS, attention="single_image"), torch.float64)
    assert method.state() == {}
    weak = weak_batch(3)
    x = method.classifier.embed(*method.backbone(weak.images))
    expected = reference.high_score_loss(
        x, method.classifier.class_weights(torch.arange(NUM_CLASSES)), method.classifier.gamma,
        [list(ids) for ids in weak.labels], weak.valid[:, ::2, ::2], (GRID, GRID),
    )  # fmt: skip
    got = method(weak, Clock(0))["aux"]
    torch.testing.assert_close(got, expected)
    parameters = list(method.classifier.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters)
    )


def test_a_source_without_l_aux_feeds_no_memory_and_unknown_weights_are_named():
    weights = {"weak/aux": 0.0, "weak/cls": 3.0, "masks": 0.5, "masks/seg": 4.0}
    method, plain = build(dataclasses.replace(SETTINGS, source_weights=weights)), build()
    losses, masks = method(weak_batch(0), Clock(0)), batch("masks", [()], 0)
    torch.testing.assert_close(losses, {"cls": 3 * plain(weak_batch(0), Clock(0))["cls"]})
    method.after_step(Clock(0))
    assert method.memory.read.counts.sum() == 0
    assert method(masks, Clock(0))["seg"] == 2 * plain(masks, Clock(0))["seg"]
    setup = Setup((Source("weak", "shards", "labels"),), None, None)
    dataclasses.replace(SETTINGS, source_weights={"weak": 1.0, "weak/aux": 0.0}).check(setup)
    for weights, message in (
        (
            {"weak/ax": 1.0},
            r"is 'weak/ax'; it must be a source of \['weak'\], or SOURCE",
        ),
        ({"weak": -1.0}, r"method.source_weights of weak is -1.0; it must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SETTINGS, source_weights=weights).check(setup)


def warmed(config=SETTINGS, num_steps=8, **options) -> LarvSeg:
    method = build(config, **options)
    for step in range(num_steps):
        for slot in range(2):
            method(weak_batch(2 * step + slot), Clock(step, slot, 2))
        method.after_step(Clock(step))
    return method


@pytest.mark.parametrize(
    "change",
    [
        {"background": "max"}, {"pool_by_attention": True}, {"temperature": 0.5},
        {"logit_scale": 10.0}, {"mask_padding": False}, {"attention": "single_image"},
        {"warm_up": 1}, {"skip_cold_background": False, "warm_up": 3}, {"memory_dtype": "bf16"},
        {"memory_scope": "slot"}, {"novel_only": True}, {"source_weights": {"weak": 2.0}},
        {"peak_threshold": -1.0}, {"distance_threshold": 0.0},
    ],
)  # fmt: skip
def test_each_flag_changes_the_auxiliary_loss_and_stays_finite(change):
    options = {"num_slots": 2, "base_classes": range(4), "num_steps": 2}  # some classes still cold

    def auxiliary(config):
        method = warmed(config, **options)
        losses = [method(weak_batch(step), Clock(9, 0, 2))["aux"] for step in range(90, 94)]
        return torch.stack(losses).sum()

    loss = auxiliary(dataclasses.replace(SETTINGS, **change))
    assert torch.isfinite(loss) and loss > 0
    assert not torch.equal(loss, auxiliary(SETTINGS))
    loss.backward()


def test_novel_only_remembers_no_base_class():
    method = warmed(dataclasses.replace(SETTINGS, novel_only=True), base_classes=range(4))
    assert method.memory.read.counts[:4].sum() == 0
    assert method.memory.read.counts[4:].min() > 0


def test_a_slots_own_memory_is_not_seen_by_another():
    method = build(dataclasses.replace(SETTINGS, memory_scope="slot"), num_slots=2)
    method(weak_batch(0), Clock(0, slot=1, num_slots=2))
    method.after_step(Clock(0))
    assert method.memory.read.counts[:NUM_CLASSES].sum() == 0
    assert method.memory.read.counts[NUM_CLASSES:].sum() > 0


def test_kept_duplicates_equal_explicit_columns():
    """Class 2 is shared by three names: three equal columns, its pixels target one of them."""
    config = dataclasses.replace(SETTINGS, keep_duplicates=True)
    counts = np.ones(NUM_CLASSES, dtype=np.int64)
    counts[2] = 3
    method = build(config, multiplicity={"masks": counts})
    one = batch("masks", [()], 0)
    got = method(one, Clock(0))["seg"]
    weight = method.classifier.class_weights(torch.arange(NUM_CLASSES))
    weight = weight.repeat_interleave(torch.from_numpy(counts), dim=0)
    first = torch.from_numpy(np.cumsum(counts) - counts)
    target = one.masks[:, ::2, ::2]
    target = torch.where(target == IGNORE, IGNORE, first[target.clamp_min(0)])
    x = method.classifier.embed(*method.backbone(one.images))
    expected = reference.seg_loss(x, weight, method.classifier.gamma, target, (GRID, GRID))
    torch.testing.assert_close(got, expected)


def test_idle_slots_and_prediction_leave_the_memory_alone():
    method = build()
    method(weak_batch(0), Clock(0, idle=True))
    method.predict(weak_batch(0).images, torch.arange(NUM_CLASSES))
    method.maps(weak_batch(0).images, [0, 1, 2, 3])
    method.after_step(Clock(0))
    assert method.memory.read.counts.sum() == 0


def test_prediction_is_the_argmax_of_the_normalised_logits():
    method = build()
    images = weak_batch(0).images
    ids = torch.tensor([7, 1, 4])
    logits = method.predict(images, ids).dense()
    x = method.classifier.embed(*method.backbone(images))
    weight = method.classifier.class_weights(ids)
    z = torch.stack([
        reference.normalised_logits(x_LD, weight, method.classifier.gamma)[1] for x_LD in x
    ])  # fmt: skip
    z = z.mT.unflatten(2, (GRID, GRID))
    shift = logits - z
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=1e-4, atol=1e-4)


def test_source_vocabularies_bound_the_softmax():
    """A source's loss sends no gradient to classes outside its vocabulary."""
    classes = {"masks": np.array([0, 2, 5]), "weak": np.array([1, 2, 3, 8])}
    method = build(classes=classes)
    losses = method(batch("labels", [[1, 8], [3]], 0), Clock(0))
    losses["cls"].backward()
    touched = method.classifier.class_table.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [1, 2, 3, 8]


def test_image_without_labels_costs_nothing_and_does_not_break():
    method = warmed()
    losses = method(batch("labels", [[], []], 0), Clock(9))
    total = sum(losses.values())
    total.backward()
    assert total.item() == 0


def test_a_crop_without_a_position_that_is_image_is_no_event():
    one, method = batch("labels", [[3], [5]], 0), build()
    one.valid[0] = torch.arange(SIZE) % (SIZE // GRID) == 0  # some pixels of every position
    sum(method(one, Clock(0)).values()).backward()
    method.after_step(Clock(0))
    assert method.memory.read.counts.nonzero().tolist() == [[5]]
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_a_label_outside_the_sources_vocabulary_is_named():
    method = build(classes={"weak": np.array([0, 1])})
    with pytest.raises(ValueError, match="label 5 of a batch of 'weak'"):
        method(batch("labels", [[5]], 0), Clock(0))
    with pytest.raises(ValueError, match="source 'other' is not one of"):
        method(batch("labels", [[0]], 0, source="other"), Clock(0))


def test_the_weak_losses_keep_no_tensor_of_pixels_by_classes():
    num_classes = 3000
    torch.manual_seed(0)
    method = LarvSeg(
        Patches(DIM, SIZE // GRID), CosineClassifier(num_classes, DIM), SETTINGS,
        classes={"weak": np.arange(num_classes)},
    )  # fmt: skip
    method.memory.read.counts.fill_(9)
    method.memory.read.means.normal_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        method(weak_batch(1), Clock(0))
    num_pairs, num_positions = 7, GRID * GRID
    largest = max(shape.numel() for shape in kept if num_classes in shape)
    assert largest <= num_classes * max(num_pairs, DIM) < num_positions * num_classes


def test_maps_and_charts_show_the_memory():
    method, images = warmed(), weak_batch(0).images
    shown = method.maps(images, [0, 1, 2, 3])["attention"]
    assert shown.shape == (4, GRID, GRID) and shown.min() >= 0 and shown.max() <= 1
    rows = method.charts()["memory/rows per class"]
    assert torch.equal(rows, method.memory.read.counts.float())
    per_slot = warmed(dataclasses.replace(SETTINGS, memory_scope="slot"), num_slots=2)
    assert per_slot.charts()["memory/rows per class"].shape == (NUM_CLASSES,)
    baseline = build(dataclasses.replace(SETTINGS, attention="off"))
    assert not baseline.maps(images, [0, 1, 2, 3]) and not baseline.charts()
    assert baseline.class_vectors() is None


@pytest.mark.parametrize("scope", ["global", "slot"])
def test_class_vectors_are_the_means_of_the_classes_with_rows(scope):
    method = build(dataclasses.replace(SETTINGS, memory_scope=scope), num_slots=2)
    read = method.memory.read
    read.means.normal_()
    read.counts.zero_()
    rings = [1, 3] if scope == "global" else [1, NUM_CLASSES + 1, 3]
    read.counts[rings] = 2
    class_ids, vectors = method.class_vectors()
    assert class_ids.tolist() == [ring % NUM_CLASSES for ring in rings]
    assert torch.equal(vectors, read.means[rings])


class TestContract(MethodContract):
    method = LarvSegConfig(capacity=3, top_k=4, warm_up=1)
    losses = {"masks": {"seg"}, "weak": {"cls", "aux"}}

    def test_a_model_that_only_predicts_reads_no_memory(self, whole, tmp_path):
        copy = tmp_path / "published"
        shutil.copytree(f"{whole[0].directory}/checkpoints/step-00000006", copy)
        for path in copy.glob("memory-*"):
            path.unlink()
        model = load_model(Checkpoint(str(copy)), torch.device("cpu"))
        assert model.method.memory is None and model.method.state() == {}
