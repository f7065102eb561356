"""RCA against the paper's equations in loops, value and gradient, and each flag's effect."""

import dataclasses

import numpy as np
import pytest
import torch
from methods.contract import MethodContract
from methods.patches import Patches
from reference import rca as reference

from memseg_dist.batch import Batch, Clock, CropBox, derive_seed
from memseg_dist.memory.layouts import Regions, image_id
from memseg_dist.methods.rca.aggregation import LinearAggregation, PrototypeAttention
from memseg_dist.methods.rca.config import RCAConfig, released
from memseg_dist.methods.rca.memory import TrainingSet
from memseg_dist.methods.rca.method import RCA
from memseg_dist.methods.rca.mixup import plan_mixup
from memseg_dist.methods.rca.prototypes import Prototypes
from memseg_dist.methods.rca.regions import region_masks, region_means

NUM_CLASSES, DIM, SIZE, GRID, NUM_IMAGES = 5, 6, 32, 4, 24
EPOCH = 3
SETTINGS = RCAConfig(contrast_weight=0.5, gate=0.5, num_prototypes=2, map_size=GRID)


def labels_of(image: int) -> tuple[int, ...]:
    draw = np.random.default_rng([7, image])
    return tuple(sorted(int(c) for c in draw.choice(NUM_CLASSES - 1, 1 + image % 3, replace=False)))


def key(image: int) -> str:
    return f"image-{image}"


def training_set() -> TrainingSet:
    pairs = [(c, image_id(key(image))) for image in range(NUM_IMAGES) for c in labels_of(image)]
    classes, images = np.array(pairs).T
    return TrainingSet(Regions.of_pairs(classes, images, NUM_CLASSES), EPOCH, 4 * EPOCH)


def build(config=SETTINGS, dtype=torch.float32, training=True, **options) -> RCA:
    torch.manual_seed(0)
    method = RCA(
        Patches(DIM, SIZE // GRID, dtype), config, classes={"weak": np.arange(NUM_CLASSES)},
        num_classes=NUM_CLASSES, training=training_set() if training else None, **options,
    )  # fmt: skip
    with torch.no_grad():  # heads that say something
        for head in (method.net.cam, method.net.final_cam):
            head.score.weight.mul_(50)
    return method.to(dtype)


def batch(step: int, slot: int, per_slot: int = 2) -> Batch:
    draw = np.random.default_rng([step, slot])
    images = draw.choice(NUM_IMAGES, per_slot, replace=False)
    pixels = torch.from_numpy(draw.integers(0, 256, (per_slot, 3, SIZE, SIZE))).to(torch.uint8)
    valid = torch.ones(per_slot, SIZE, SIZE, dtype=torch.bool)
    valid[0, :, SIZE // 2 :] = False
    boxes = (CropBox(0.0, 0.0, 1.0, 1.0, False, SIZE, SIZE // 2),) + (
        CropBox(0.0, 0.0, 1.0, 1.0, True, SIZE, SIZE),
    ) * (per_slot - 1)
    return Batch(
        pixels, valid, None, tuple(labels_of(i) for i in images), "weak", "labels",
        tuple(key(i) for i in images), crop_boxes=boxes,
    )  # fmt: skip


def run_step(method: RCA, step: int, num_slots: int, per_slot: int) -> dict[str, torch.Tensor]:
    """One global step on one process, as the loop does it: mean losses, gradients added up."""
    clocks = [Clock(step, slot, num_slots, seed=11) for slot in range(num_slots)]
    whole = Clock(step, num_slots=num_slots, seed=11)
    batches = [batch(step, slot, per_slot) for slot in range(num_slots)]
    method.before_step(list(zip(batches, clocks)), whole)
    total: dict[str, torch.Tensor] = {}
    for item, clock in zip(batches, clocks):
        losses = method(item, clock)
        (sum(losses.values()) / num_slots).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach() / num_slots
    method.after_step(whole)
    return total


class ByLoops:
    """The whole of Eq. 1 - 11 over the global batch, with the weights of `method`; with its flags
    as the paper has them, or all as the released code has them.
    """

    def __init__(self, method: RCA, config: RCAConfig) -> None:
        self.method, self.config = method, config
        self.is_released = config.keying == "ring"
        self.memory: dict = {}
        self.writes = [0] * NUM_CLASSES
        if self.is_released:  # noise counts as set
            rows = method.memory.rows.clone().unflatten(0, (NUM_CLASSES, config.capacity))
            for class_id, ring in enumerate(rows):
                self.memory |= {(class_id, position): row for position, row in enumerate(ring)}

    def step(self, step: int, num_slots: int, per_slot: int) -> dict[str, torch.Tensor]:
        config, events, regions = self.config, [], []
        final, between = [], []
        for slot in range(num_slots):
            item = batch(step, slot, per_slot)
            features = self.method.backbone(item.images)[0]
            embedded = self.method.net.reduce(features)
            queries = self.method.net.project(embedded)
            dim = embedded.shape[1]
            stride = SIZE // GRID
            for b, labels in enumerate(item.labels):
                valid = item.valid[b, ::stride, ::stride]
                net = self.method.net
                read = net.prototypes.vectors
                if self.is_released:
                    mixed = reference.linearly_aggregated(embedded[b], read, net.linear)
                else:
                    added = reference.aggregated(embedded[b], read, dim**-0.5)[dim:]
                    mixed = torch.cat([features[b], added])
                p_map = net.cam(features[b][None])[0]
                o_map = net.final_cam(mixed[None])[0]
                final.append(reference.label_loss(o_map, valid, set(labels)))
                between.append(reference.label_loss(p_map, valid, set(labels)))
                seen = p_map.softmax(dim=0) if self.is_released else p_map
                for label in labels:
                    vector = reference.region_vector(embedded[b], seen[label], valid)
                    query = reference.region_vector(queries[b], seen[label], valid)
                    gate = torch.sigmoid(o_map[label][valid].mean()) > config.gate
                    identity = image_id(item.keys[b])
                    events.append((label, identity, vector, gate))
                    weight = 1 / (num_slots * len(labels))
                    if config.contrast_reduction == "mean":
                        weight = weight / per_slot
                    regions.append((label, identity, query, weight, slot))
        losses = {
            "final": torch.stack(final).mean(),
            "intermediate": config.intermediate_weight * torch.stack(between).mean(),
        }
        if step >= config.warmup_epochs * EPOCH and config.contrast_weight:
            parts = [regions]
            if config.mixup_scope == "slot":
                parts = [[r for r in regions if r[4] == slot] for slot in range(num_slots)]
            losses["contrast"] = config.contrast_weight * sum(
                self._contrast(part, step, (slot,) if len(parts) > 1 else ())
                for slot, part in enumerate(parts)
            )
        for label, identity, vector, gate in events:
            if gate:
                place = self.writes[label] % config.capacity if self.is_released else identity
                self.writes[label] += 1
                reference.remember(self.memory, (label, place), vector, config.momentum)
        return losses

    def _contrast(self, regions, step, of_slot):
        temperature, total = self.config.temperature, 0
        if not self.config.mixup:
            return sum(
                w * reference.nce(v, c, self.memory, temperature) for c, _, v, w, _ in regions
            )
        plan = plan_mixup(
            np.array([r[0] for r in regions]), np.array([r[1] for r in regions]),
            beta=self.config.mixup_beta, seed=derive_seed(11, "mixup", step, *of_slot),
            pair=self.config.mixup_pair,
        )  # fmt: skip
        for g, (label, identity, vector, weight, _) in enumerate(regions):
            other = regions[plan.partner[g]]
            if plan.partner[g] != g and not self.is_released:
                assert other[0] != label and other[1] != identity
            total = total + weight * reference.mixed_nce(
                vector, label, other[2], other[0], float(plan.omega[g]), self.memory, temperature
            )
        return total


@pytest.mark.parametrize("mixup", [True, False])
@pytest.mark.parametrize(("num_slots", "per_slot"), [(1, 6), (3, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_losses_and_gradients_equal_the_paper_over_a_run(
    dtype, tolerance, num_slots, per_slot, mixup, monkeypatch
):
    if dtype == torch.float64:  # the method computes in fp32: let it compute in fp64 here
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    # k-means computes in fp32: in fp64 every row is a prototype
    num_prototypes = 2 if dtype == torch.float32 else None
    config = dataclasses.replace(SETTINGS, mixup=mixup, num_prototypes=num_prototypes)
    assert_equal_to_the_loops(config, dtype, tolerance, num_slots, per_slot)


@pytest.mark.parametrize(("num_slots", "per_slot"), [(1, 4), (2, 3)])
def test_the_released_preset_equals_the_code_by_loops(num_slots, per_slot, monkeypatch):
    """All its choices at once: rings of noise, linear aggregation, deep heads, a projector."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = dataclasses.replace(
        released(SETTINGS), capacity=3, head_width=4, num_prototypes=None, warmup_epochs=1
    )
    assert_equal_to_the_loops(config, torch.float64, 1e-9, num_slots, per_slot)


def test_a_reduction_before_memory_and_aggregation_equals_the_loops(monkeypatch):
    """As for the 4,096 channels of ResNet38. It is computed once a slot."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = dataclasses.replace(SETTINGS, reduce_to=4, num_prototypes=None)
    assert_equal_to_the_loops(config, torch.float64, 1e-9, num_slots=1, per_slot=4)
    method, calls = build(config), []
    method.net.reduce.register_forward_hook(lambda *_: calls.append(1))
    method(batch(0, 0), Clock(0))
    assert len(calls) == 1


def assert_equal_to_the_loops(config, dtype, tolerance, num_slots, per_slot) -> None:
    method = build(config, dtype)
    if dtype == torch.float64:
        _memory_in_double(method)
    slow = ByLoops(method, config)
    parameters = list(method.parameters())
    for step in range(3 * EPOCH):
        expected = slow.step(step, num_slots, per_slot)
        expected_grad = torch.autograd.grad(sum(expected.values()), parameters, allow_unused=True)
        losses = run_step(method, step, num_slots, per_slot)
        assert set(losses) == set(expected)
        for name, loss in losses.items():
            torch.testing.assert_close(
                loss, expected[name].detach(), rtol=tolerance, atol=tolerance
            )
        for parameter, gradient in zip(parameters, expected_grad):
            zero = torch.zeros_like(parameter)  # None and 0 are one gradient
            wanted = zero if gradient is None else gradient
            found = zero if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
            parameter.grad = None
    rows = torch.stack([slow.memory[pair] for pair in sorted(slow.memory)])
    torch.testing.assert_close(method.memory.set_rows()[0], rows, rtol=tolerance, atol=tolerance)
    assert "contrast" in losses and len(method.net.prototypes) > NUM_CLASSES - 1


def _memory_in_double(method: RCA) -> None:
    method.memory._rows = method.memory._rows.double()
    method.contrast._rows.lengths = method.contrast._rows.lengths.double()
    method.contrast._rows.refresh(np.arange(NUM_CLASSES), slice(None))
    for proposals in (method.memory._proposals, method.contrast._seen):
        proposals.empty = proposals.empty.double()


def test_pooling_several_labels_equals_pooling_each_alone():
    """The released code zeroes for a second class what the first one used."""
    features = torch.randn(2, DIM, 16)
    maps = torch.randn(2, NUM_CLASSES, 16)
    valid = torch.ones(2, 16, dtype=torch.bool)
    image, column = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 4, 2])
    masks = region_masks(maps, valid, image, column)
    together = region_means(features, masks, image)
    for r in range(4):
        alone = region_means(features, masks[r : r + 1], image[r : r + 1])
        torch.testing.assert_close(together[r : r + 1], alone)
        inside = features[image[r]][:, maps[image[r], column[r]] > maps[image[r], column[r]].mean()]
        torch.testing.assert_close(together[r], inside.mean(dim=1))


def test_a_constant_map_pools_the_whole_image_and_padding_never_counts():
    maps = torch.zeros(1, 1, 4)
    valid = torch.tensor([[True, True, True, False]])
    mask = region_masks(maps, valid, torch.tensor([0]), torch.tensor([0]))
    assert mask.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_mixup_partners_come_from_other_images_and_classes(count):
    draw = np.random.default_rng(count)
    classes, images = draw.integers(0, 3, count), draw.integers(0, 4, count)
    for seed in range(50):
        plan = plan_mixup(classes, images, beta=8.0, seed=seed)
        again = plan_mixup(classes, images, beta=8.0, seed=seed)
        assert (plan.partner == again.partner).all() and (plan.omega == again.omega).all()
        for own, (partner, omega) in enumerate(zip(*plan)):
            if partner == own:
                others = (classes != classes[own]) & (images != images[own])
                assert omega == 1 and not others.any()
            else:
                assert classes[partner] != classes[own] and images[partner] != images[own]
                assert 0 < omega < 1


def test_omega_is_beta_distributed():
    count = 2000
    plan = plan_mixup(np.arange(count), np.arange(count), beta=8.0, seed=0)
    assert plan.omega.mean() == pytest.approx(0.5, abs=0.01)
    assert plan.omega.std() == pytest.approx(0.1213, abs=0.01)  # 1 / (2 sqrt(2 beta + 1))


@pytest.mark.parametrize("scale", ["raw", "sqrt_dim"])
def test_aggregation_equals_the_loops(scale):
    features = torch.randn(2, DIM, 3, 4, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(7, DIM, dtype=torch.float64)
    attention = PrototypeAttention(scale)
    read = attention(features, prototypes)
    factor = 1.0 if scale == "raw" else DIM**-0.5
    slow = torch.stack([reference.aggregated(one, prototypes, factor)[DIM:] for one in features])
    torch.testing.assert_close(read, slow)
    weight = torch.randn_like(read)
    (fast_grad,) = torch.autograd.grad((read * weight).sum(), features, retain_graph=True)
    (slow_grad,) = torch.autograd.grad((slow * weight).sum(), features)
    torch.testing.assert_close(fast_grad, slow_grad)
    affinity = attention.affinity(features, prototypes)
    torch.testing.assert_close(torch.einsum("bphw,pd->bdhw", affinity, prototypes), read)


def test_linear_aggregation_of_the_code_equals_the_loops():
    torch.manual_seed(0)
    module = LinearAggregation(DIM).double()
    features = torch.randn(2, DIM, 3, 4, dtype=torch.float64)
    prototypes = torch.randn(7, DIM, dtype=torch.float64)
    slow = [reference.linearly_aggregated(one, prototypes, module) for one in features]
    torch.testing.assert_close(module(features, prototypes), torch.stack(slow))


def test_attention_keeps_no_map_of_positions_by_prototypes():
    features = torch.randn(2, 16, 24, 24, requires_grad=True)
    prototypes = torch.randn(400, 16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        PrototypeAttention()(features, prototypes)
    assert max(kept) < 24 * 24 * 400


def test_a_published_model_needs_prototypes_and_no_memory():
    method = build()
    for step in range(2 * EPOCH):
        run_step(method, step, 1, 6)
    method.eval()
    images, classes = batch(9, 0).images, torch.tensor([0, 2, 3])
    alone = build(training=False)
    assert alone.memory is None and alone.state() == {} and len(alone.net.prototypes) == 0
    alone.load_state_dict(method.state_dict())
    assert not any("memory" in name for name in method.state_dict())
    with torch.no_grad():
        expected = method.predict(images, classes).dense()
        torch.testing.assert_close(alone.predict(images, classes).dense(), expected)
        (features,) = method.backbone(images)
        final = method.net.final_cam(
            torch.stack(
                [
                    reference.aggregated(f, method.net.prototypes.vectors, DIM**-0.5)
                    for f in features
                ]
            )
        )
    torch.testing.assert_close(expected, final[:, classes])
    shown = alone.maps(images, [1, 2])
    assert set(shown) == {"P", "O", "prototype 1", "prototype 2"}
    assert all(float(m.min()) >= 0 and float(m.max()) <= 1 for m in shown.values())


@pytest.mark.parametrize("head", ["linear", "trunk", "per_class"])
def test_every_head_predicts_what_it_trains(head):
    config = dataclasses.replace(SETTINGS, final_head=head, head=head, head_width=4)
    method = build(config).eval()
    images = batch(0, 0).images
    (features,) = method.backbone(images)
    with torch.no_grad():
        final = method.net.final_cam(torch.cat([features, 0 * features], dim=1))
        predicted = method.predict(images, torch.tensor([4, 1])).dense()
    torch.testing.assert_close(predicted, final[:, [4, 1]])


def test_the_released_preset_runs_and_differs():
    config = dataclasses.replace(
        released(SETTINGS), capacity=3, head_width=4, contrast_weight=0.5, num_prototypes=2
    )
    method = build(config)
    assert len(method.net.prototypes) == 2 * NUM_CLASSES and method.memory.is_set.all()
    noise = method.memory.rows.clone()
    losses = [run_step(method, step, 1, 6) for step in range(3 * EPOCH)]
    assert all(torch.isfinite(torch.stack(list(loss.values()))).all() for loss in losses)
    assert not torch.equal(noise, method.memory.rows)
    assert {"contrast", "final", "intermediate"} == set(losses[-1])


def test_noise_without_aggregation_makes_no_prototypes():
    config = dataclasses.replace(released(SETTINGS), capacity=3, head_width=4, aggregation="off")
    assert len(build(config).net.prototypes) == 0


def test_without_contrast_and_aggregation_nothing_is_remembered():
    """The paper's baseline: a classifier whose maps are accumulated."""
    config = dataclasses.replace(SETTINGS, contrast_weight=0, aggregation="off")
    method = build(config)
    assert set(run_step(method, 0, 1, 6)) == {"final", "intermediate"}
    assert set(method.state()) == {"maps"} and method.contrast is None


def test_accumulated_maps_are_the_strongest_seen_turned_back():
    config = dataclasses.replace(SETTINGS, contrast_weight=0, aggregation="off", map_gate=0.0)
    method = build(config)
    expected: dict = {}
    for step in range(EPOCH + 4):
        item = batch(step, 0, 6)
        with torch.no_grad():
            maps = method.net.final_cam(*method.backbone(item.images))
        run_step(method, step, 1, 6)
        for b, labels in enumerate(item.labels) if step >= EPOCH else ():
            valid = item.valid[b, :: SIZE // GRID, :: SIZE // GRID]
            for label in labels:
                one = maps[b, label].relu() * valid
                one = one / one.max().clamp_min(1e-5)
                if b == 0:  # its left half is all of the image: stretched to it
                    one = torch.nn.functional.interpolate(
                        one[None, None, :, : GRID // 2], (GRID, GRID), mode="bilinear"
                    )[0, 0]
                else:
                    one = one.flip(1)
                pair = (label, image_id(item.keys[b]))
                seen = (255 * one).round()
                expected[pair] = torch.maximum(expected.get(pair, seen), seen)
    store = method.accumulated.rows
    rows = store.layout.find(np.array(list(expected)))
    kept, wanted = store.rows[rows].float(), torch.stack(list(expected.values()))
    inner = [0, 1]  # beyond, the left half is blended with the padding beside it
    assert (kept[..., inner] - wanted[..., inner]).abs().max() <= 1  # a level of rounding
    assert (store.updates > 0).sum() == len(expected)


def test_an_image_without_labels_is_a_negative_and_a_blank_one_is_nothing():
    method = build()
    item = batch(0, 0)
    empty = dataclasses.replace(item, labels=((), ()))
    losses = method(empty, Clock(5))
    assert losses["contrast"] == 0 and losses["final"] > 0
    blank = dataclasses.replace(empty, valid=torch.zeros_like(item.valid))
    assert method(blank, Clock(5))["final"] == 0


def test_a_crop_without_a_position_that_is_image_is_not_remembered():
    config = dataclasses.replace(SETTINGS, gate=0.0, map_gate=0.0)
    method, item = build(config), batch(EPOCH, 0)
    item.valid[0] = torch.arange(SIZE) % (SIZE // GRID) == 0  # some pixels of every position
    sum(method(item, Clock(EPOCH)).values()).backward()
    method.after_step(Clock(EPOCH))
    seen = [(label, image_id(item.keys[1])) for label in item.labels[1]]
    for rows in method.state().values():
        assert sorted(np.flatnonzero(rows.is_set)) == sorted(rows.layout.find(np.array(seen)))


def test_eps_is_a_background_channel_and_a_saliency_loss():
    from memseg_dist.methods.rca.saliency_loss import saliency_loss

    config = dataclasses.replace(SETTINGS, saliency_weight=2.0)
    method = build(config)
    item = batch(0, 0)
    with pytest.raises(ValueError, match="the batch has no saliency maps"):
        method(item, Clock(0))
    saliency = torch.rand(2, SIZE, SIZE).masked_fill(~item.valid, -1)
    item = dataclasses.replace(item, saliency=saliency)
    losses = method(item, Clock(0))
    (features,) = method.backbone(item.images)
    maps = method.net.final_cam(torch.cat([features, 0 * features], dim=1))
    assert maps.shape[1] == NUM_CLASSES + 1
    labels = torch.zeros(2, NUM_CLASSES, dtype=torch.bool)
    for image, present in enumerate(item.labels):
        labels[image, list(present)] = True
    expected = 2 * saliency_loss(maps, labels, saliency, stride=SIZE // GRID)
    torch.testing.assert_close(losses["saliency"], expected)
    predicted = method.predict(item.images, torch.tensor([0, 4])).dense()
    torch.testing.assert_close(predicted, maps[:, [0, 4]])


def test_maps_of_eps_are_shares_of_all_classes_and_the_background():
    config = dataclasses.replace(
        SETTINGS, saliency_weight=1.0, contrast_weight=0.0, aggregation="off", map_gate=0.0
    )
    method = build(config)
    item = batch(EPOCH, 0)
    item, label = dataclasses.replace(item, saliency=torch.rand(2, SIZE, SIZE)), item.labels[1][0]
    (features,) = method.backbone(item.images)
    share = method.net.final_cam(features).softmax(dim=1)[:, label]
    found = method.activations(item.images, torch.tensor([4, label]))[:, 1]
    torch.testing.assert_close(found, share)
    over_maximum = share / share.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(method.maps(item.images, [label, label])["O"], over_maximum)
    assert method.net.cam(features).shape[1] == NUM_CLASSES  # no saliency teaches P
    method(item, Clock(EPOCH))
    method.after_step(Clock(EPOCH))
    store = method.accumulated.rows
    kept = store.rows[store.layout.find(np.array([[label, image_id(item.keys[1])]]))][0]
    expected = (255 * over_maximum[1].flip(1)).round().to(torch.uint8)  # the image was mirrored
    torch.testing.assert_close(kept, expected, atol=1, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_never_waits_for_the_device():
    device = torch.device("cuda")
    method = build(device=device).to(device)
    items = [batch(step, slot).to(device) for step in range(3) for slot in range(2)]
    for item in items[:2]:  # what is set up once may wait
        method(item, Clock(EPOCH, 0, 1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = method(items[2], Clock(EPOCH, 0, 1))
        sum(losses.values()).backward()
        method.after_step(Clock(EPOCH, num_slots=1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "contrast" in losses


def test_unknown_sources_labels_and_classes_are_named():
    method = build()
    with pytest.raises(ValueError, match="source 'other' is not one of"):
        method(dataclasses.replace(batch(0, 0), source="other"), Clock(0))
    narrow = RCA(
        Patches(DIM, SIZE // GRID),
        SETTINGS,
        classes={"weak": np.arange(2)},
        num_classes=NUM_CLASSES,
    )
    with pytest.raises(ValueError, match=r"class ids \[4\] have no activation map"):
        narrow.predict(batch(0, 0).images, torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"label . of a batch of 'weak' is not in the vocabulary"):
        narrow(dataclasses.replace(batch(0, 0), labels=((3,), (4,))), Clock(0))
    with pytest.raises(ValueError, match=r"noise with method.keying 'image'"):
        RCAConfig(noise=True)
    with pytest.raises(ValueError, match="num_prototypes is 0"):
        RCAConfig(num_prototypes=0)


def test_charts_show_classes_and_clusters():
    method = build()
    assert set(method.charts()) == {"memory/rows set per class"}
    vectors = torch.randn(4, DIM)
    method.net.prototypes = Prototypes(
        vectors, torch.tensor([0, 0, 1, 2]), torch.tensor([2, 5, 1, 0])
    )
    assert method.charts()["prototypes/rows per prototype"].tolist() == [5, 2, 1, 0]
    class_ids, shown = method.class_vectors()
    assert class_ids.tolist() == [0, 0, 1] and torch.equal(shown, vectors[:3])  # no noise


class TestContract(MethodContract):
    method = RCAConfig(contrast_weight=0.2, gate=0.45, num_prototypes=2, map_size=8)
    losses = {"weak": {"final", "intermediate", "contrast"}}


class TestReleasedContract(MethodContract):
    method = dataclasses.replace(
        released(TestContract.method), warmup_epochs=1, capacity=3, head_width=4
    )
    losses = {"weak": {"final", "intermediate", "contrast"}}
