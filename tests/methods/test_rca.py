"""RCA against the paper's equations in loops, value and gradient, and each flag's effect."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from memseg_dist.batch import Batch, Clock, Place, derive_seed
from memseg_dist.losses.mixup import plan_mixup
from memseg_dist.losses.regions import region_masks, region_means, valid_positions
from memseg_dist.memory.prototypes import Prototypes
from memseg_dist.memory.regions import Regions, image_id
from memseg_dist.methods import rca_reference as reference
from memseg_dist.methods.rca import RCA, TrainingSet
from memseg_dist.methods.rca_config import RCAConfig, released
from memseg_dist.models.aggregation import LinearAggregation, PrototypeAttention

NUM_CLASSES, DIM, SIZE, GRID, NUM_IMAGES = 5, 6, 32, 4, 24
EPOCH = 3
SETTINGS = RCAConfig(contrast_weight=0.5, gate=0.5, num_prototypes=2, map_size=GRID)


class Patches(nn.Module):
    """A backbone that is nothing but one strided convolution."""

    dim, stride = DIM, SIZE // GRID

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, DIM, SIZE // GRID, SIZE // GRID, dtype=dtype)

    def forward(self, images, valid=None):
        return self.conv(images.to(self.conv.weight.dtype) / 255)


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
        Patches(dtype), config, classes={"weak": np.arange(NUM_CLASSES)}, num_classes=NUM_CLASSES,
        training=training_set() if training else None, **options,
    )  # fmt: skip
    with torch.no_grad():  # heads that say something
        for head in (method.cam, method.final_cam):
            head.score.weight.mul_(50)
    return method.to(dtype)


def batch(step: int, slot: int, per_slot: int = 2) -> Batch:
    draw = np.random.default_rng([step, slot])
    images = draw.choice(NUM_IMAGES, per_slot, replace=False)
    pixels = torch.from_numpy(draw.integers(0, 256, (per_slot, 3, SIZE, SIZE))).to(torch.uint8)
    valid = torch.ones(per_slot, SIZE, SIZE, dtype=torch.bool)
    valid[0, :, SIZE // 2 :] = False
    places = (Place(0.0, 0.0, 1.0, 1.0, False, SIZE, SIZE // 2),) + (
        Place(0.0, 0.0, 1.0, 1.0, True, SIZE, SIZE),
    ) * (per_slot - 1)
    return Batch(
        pixels, valid, None, tuple(labels_of(i) for i in images), "weak", "labels",
        tuple(key(i) for i in images), places=places,
    )  # fmt: skip


def run_step(method: RCA, step: int, num_slots: int, per_slot: int) -> dict[str, torch.Tensor]:
    """One global step on one process, as the loop does it: mean losses, gradients added up."""
    clocks = [Clock(step, slot, num_slots, seed=11) for slot in range(num_slots)]
    whole = Clock(step, num_slots=num_slots, seed=11)
    batches = [batch(step, slot, per_slot) for slot in range(num_slots)]
    if method.previews(whole):
        for item, clock in zip(batches, clocks):
            method.preview(item, clock)
        method.exchange(whole)
    total: dict[str, torch.Tensor] = {}
    for item, clock in zip(batches, clocks):
        losses = method(item, clock)
        (sum(losses.values()) / num_slots).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach() / num_slots
    method.after_step(whole)
    return total


class ByLoops:
    """The whole of Eq. 1 - 11 over the global batch, with the weights of `method`."""

    def __init__(self, method: RCA, config: RCAConfig) -> None:
        self.method, self.config = method, config
        self.memory: dict = {}

    def step(self, step: int, num_slots: int, per_slot: int) -> dict[str, torch.Tensor]:
        config, events, regions = self.config, [], []
        final, between = [], []
        for slot in range(num_slots):
            item = batch(step, slot, per_slot)
            features = self.method.backbone(item.images)
            stride = SIZE // GRID
            for b, labels in enumerate(item.labels):
                valid = item.valid[b, ::stride, ::stride]
                scale = DIM**-0.5
                mixed = reference.aggregated(features[b], self.method.prototypes, scale)
                p_map = self.method.cam(features[b][None])[0]
                o_map = self.method.final_cam(mixed[None])[0]
                final.append(reference.label_loss(o_map, valid, set(labels)))
                between.append(reference.label_loss(p_map, valid, set(labels)))
                for label in labels:
                    vector = reference.region_vector(features[b], p_map[label], valid)
                    gate = torch.sigmoid(o_map[label][valid].mean()) > config.gate
                    identity = image_id(item.keys[b])
                    events.append((label, identity, vector, gate))
                    weight = 1 / (num_slots * per_slot * len(labels))
                    regions.append((label, identity, vector, weight))
        losses = {
            "final": torch.stack(final).mean(),
            "intermediate": config.intermediate_weight * torch.stack(between).mean(),
        }
        if step >= EPOCH and config.contrast_weight:
            losses["contrast"] = config.contrast_weight * self._contrast(regions, step)
        for label, identity, vector, gate in events:
            if gate:
                reference.remember(self.memory, (label, identity), vector, config.momentum)
        return losses

    def _contrast(self, regions, step):
        temperature, total = self.config.temperature, 0
        if not self.config.mixup:
            return sum(w * reference.nce(v, c, self.memory, temperature) for c, _, v, w in regions)
        plan = plan_mixup(
            np.array([r[0] for r in regions]), np.array([r[1] for r in regions]),
            beta=self.config.mixup_beta, seed=derive_seed(11, "mixup", step),
        )  # fmt: skip
        for g, (label, identity, vector, weight) in enumerate(regions):
            other = regions[plan.partner[g]]
            if plan.partner[g] != g:
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
    method = build(config, dtype)
    if dtype == torch.float64:
        _memory_in_double(method)
    slow = ByLoops(method, config)
    parameters = list(method.parameters())
    for step in range(3 * EPOCH):
        expected = slow.step(step, num_slots, per_slot)
        expected_grad = torch.autograd.grad(sum(expected.values()), parameters)
        losses = run_step(method, step, num_slots, per_slot)
        assert set(losses) == set(expected)
        for name, loss in losses.items():
            torch.testing.assert_close(
                loss, expected[name].detach(), rtol=tolerance, atol=tolerance
            )
        for parameter, gradient in zip(parameters, expected_grad):
            torch.testing.assert_close(parameter.grad, gradient, rtol=tolerance, atol=tolerance)
            parameter.grad = None
    rows = torch.stack([slow.memory[pair] for pair in sorted(slow.memory)])
    torch.testing.assert_close(method.memory.set_rows()[0], rows, rtol=tolerance, atol=tolerance)
    assert "contrast" in losses and len(method.prototypes) > NUM_CLASSES - 1


def _memory_in_double(method: RCA) -> None:
    for name in ("_rows", "_length"):
        setattr(method.memory, name, getattr(method.memory, name).double())
    method.memory._proposals.empty = method.memory._proposals.empty.double()
    method._seen.empty = method._seen.empty.double()


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
    assert alone.memory is None and alone.state() == {} and len(alone.prototypes) == 0
    alone.load_state_dict(method.state_dict())
    assert not any("memory" in name for name in method.state_dict())
    with torch.no_grad():
        expected = method.predict(images, classes).dense()
        torch.testing.assert_close(alone.predict(images, classes).dense(), expected)
        features = method.backbone(images)
        final = method.final_cam(
            torch.stack([reference.aggregated(f, method.prototypes, DIM**-0.5) for f in features])
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
    features = method.backbone(images)
    with torch.no_grad():
        final = method.final_cam(torch.cat([features, 0 * features], dim=1))
        predicted = method.predict(images, torch.tensor([4, 1])).dense()
    torch.testing.assert_close(predicted, final[:, [4, 1]])


def test_the_released_preset_runs_and_differs():
    config = dataclasses.replace(
        released(SETTINGS), capacity=3, head_width=4, contrast_weight=0.5, num_prototypes=2
    )
    method = build(config)
    assert len(method.prototypes) == 2 * NUM_CLASSES and method.memory.is_set.all()
    noise = method.memory.rows.clone()
    losses = [run_step(method, step, 1, 6) for step in range(3 * EPOCH)]
    assert all(torch.isfinite(torch.stack(list(loss.values()))).all() for loss in losses)
    assert not torch.equal(noise, method.memory.rows)
    assert {"contrast", "final", "intermediate"} == set(losses[-1])


def test_without_contrast_and_aggregation_nothing_is_remembered():
    """The paper's baseline: a classifier whose maps are accumulated."""
    config = dataclasses.replace(SETTINGS, contrast_weight=0, aggregation="off")
    method = build(config)
    assert set(run_step(method, 0, 1, 6)) == {"final", "intermediate"}
    assert set(method.state()) == {"maps"} and not method.previews(Clock(9, num_slots=4))


def test_accumulated_maps_are_the_strongest_seen_turned_back():
    config = dataclasses.replace(SETTINGS, contrast_weight=0, aggregation="off", map_gate=0.0)
    method = build(config)
    expected: dict = {}
    for step in range(EPOCH + 4):
        item = batch(step, 0, 6)
        with torch.no_grad():
            maps = method.final_cam(method.backbone(item.images))
        run_step(method, step, 1, 6)
        for b, labels in enumerate(item.labels) if step >= EPOCH else ():
            valid = item.valid[b, :: SIZE // GRID, :: SIZE // GRID]
            for label in labels:
                one = maps[b, label].relu() * valid
                one = one / one.max().clamp_min(1e-5)
                if b == 0:  # its left half is all of the image: stretched to it
                    one = nn.functional.interpolate(
                        one[None, None, :, : GRID // 2], (GRID, GRID), mode="bilinear"
                    )[0, 0]
                else:
                    one = one.flip(1)
                pair = (label, image_id(item.keys[b]))
                seen = (255 * one).round()
                expected[pair] = torch.maximum(expected.get(pair, seen), seen)
    store = method.maps_seen
    rows = store.regions.find(*np.array(list(expected)).T)
    kept, wanted = store.maps[rows].float(), torch.stack(list(expected.values()))
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


def test_eps_is_a_background_channel_and_a_saliency_loss():
    from memseg_dist.losses.saliency import saliency_loss

    config = dataclasses.replace(SETTINGS, saliency_weight=2.0)
    method = build(config)
    item = batch(0, 0)
    with pytest.raises(ValueError, match="source 'weak' has no saliency maps"):
        method(item, Clock(0))
    saliency = torch.rand(2, SIZE, SIZE).masked_fill(~item.valid, -1)
    losses = method(dataclasses.replace(item, saliency=saliency), Clock(0))
    features = method.backbone(item.images)
    maps = method.final_cam(torch.cat([features, 0 * features], dim=1))
    assert maps.shape[1] == NUM_CLASSES + 1
    labels = torch.zeros(2, NUM_CLASSES, dtype=torch.bool)
    for image, present in enumerate(item.labels):
        labels[image, list(present)] = True
    torch.testing.assert_close(losses["saliency"], 2 * saliency_loss(maps, labels, saliency))
    predicted = method.predict(item.images, torch.tensor([0, 4])).dense()
    torch.testing.assert_close(predicted, maps[:, [0, 4]])


def test_padding_that_fills_the_last_stride_is_no_image():
    valid = torch.ones(1, 9, 12, dtype=torch.bool)
    found = valid_positions(valid, (3, 3), 4).unflatten(1, (3, 3))[0]
    assert found.tolist() == [[True] * 3, [True] * 3, [False] * 3]


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
        Patches(torch.float32), SETTINGS, classes={"weak": np.arange(2)}, num_classes=NUM_CLASSES
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
    sizes = Prototypes(torch.zeros(3, DIM), torch.tensor([0, 0, 1]), torch.tensor([2, 5, 1]))
    method.prototypes, method.prototype_classes, method.prototype_sizes = sizes
    assert method.charts()["prototypes/rows per prototype"].tolist() == [5, 2, 1]
