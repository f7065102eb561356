"""PseudoSeg's whole step against its equations; who learns from what; bad input; use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import pseudoseg as reference
from torch import Tensor, nn
from train.shards import larvseg_config, write_squares

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import IGNORE, Batch, Clock
from memseg_dist.config import RunConfig
from memseg_dist.data.loader import Source
from memseg_dist.methods.pseudoseg.augment import StrongView, strong_view
from memseg_dist.methods.pseudoseg.config import PseudoSegConfig
from memseg_dist.methods.pseudoseg.method import PseudoSeg
from memseg_dist.nn.backbone import FeatureStage
from memseg_dist.nn.batchnorm import recording

SIZE, NUM_CLASSES, BACKGROUND = 16, 6, 2
MASKED, WEAK = np.array([0, 2, 3, 5]), np.array([0, 1, 3])
SMALL = PseudoSegConfig(dim=6, attention_dim=3, rates=(1, 2), dropout=0.0, warmup=0.0)


class ThreeStages(nn.Module):
    """Maps of stride 2, 4 and 4 of three convolutions; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        dims = (4, 5, 7)
        self.stages = tuple(map(FeatureStage, dims, (2, 4, 4)))
        self.dim, self.stride = dims[-1], 4
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 5, 2, 2), nn.Conv2d(5, 7, 1)]
        )
        self.num_forwards = 0

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        self.num_forwards += 1
        x = images.to(self.convs[0].weight.dtype) / 255
        if valid is not None:
            x = x * valid[:, None]
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        maps = []
        for conv in self.convs:
            x = conv(x).tanh()
            maps.append(x)
        return tuple(maps)


def build(config: PseudoSegConfig = SMALL, background: int | None = BACKGROUND) -> PseudoSeg:
    """A slot with masks, two with labels, one with neither."""
    torch.manual_seed(0)
    sources = {
        "masks": Source("masks", "", "masks"),
        "weak": Source("weak", "", "labels", slots=2),
        "unlabelled": Source("unlabelled", "", "none"),
    }
    classes = {"masks": MASKED, "weak": WEAK, "unlabelled": MASKED}
    method = PseudoSeg(
        ThreeStages(), config, sources=sources, classes=classes, num_classes=NUM_CLASSES,
        background=background,
    )  # fmt: skip
    return method.double()


def batch(source: str, seed: int = 1) -> Batch:
    """Two images, the second with padding at the right."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    valid = torch.ones(2, SIZE, SIZE, dtype=torch.bool)
    valid[1, :, -4:] = False
    images[1, :, :, -4:] = 0
    masks, labels = None, ((), ())
    if source == "masks":
        masks = torch.from_numpy(MASKED)[torch.randint(0, 4, valid.shape, generator=draw)]
        masks = masks.masked_fill(~valid, IGNORE)
        labels = ((0, 2), (2, 3, 5))
    elif source == "weak":
        labels = ((0, 1), (3,))
    kind = {"masks": "masks", "weak": "labels", "unlabelled": "none"}[source]
    return Batch(images, valid, masks, labels, source, kind, ("a", "b"))


def resized(map: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(map, size, mode="bilinear", align_corners=False)


def named(labels: tuple[tuple[int, ...], ...], foreground: list[int]) -> Tensor:
    return torch.tensor([[c in own for c in foreground] for own in labels])


class BySteps:
    """The losses from the layers of `method`, equation by equation. Foreground: 0, 3, 5."""

    trained, foreground, share = MASKED.tolist(), [0, 3, 5], {"masks": 4, "labels": 2, "u": 4 / 3}

    def __init__(self, method: PseudoSeg) -> None:
        self.net, self.backbone, self.config = method.net, method.backbone, method.config

    def activation_logits(self, maps, shown: Tensor, valid: Tensor) -> Tensor:
        deep, net = maps[-1], self.net
        cams = []
        for b, one in enumerate(deep):
            copy = one.detach().clone().requires_grad_()
            mean = copy[:, valid[b]].mean(dim=1)
            logits = net.classifier(mean)[self.foreground]
            weights = [
                torch.autograd.grad(x, copy, retain_graph=True)[0].sum((1, 2)) for x in logits
            ]
            cam = torch.stack([torch.einsum("d,dhw->hw", w, copy.detach()) for w in weights])
            cam = cam.relu() * valid[b] * shown[b, :, None, None]
            peak = cam.amax(dim=(1, 2), keepdim=True)
            cams.append(cam / peak.where(peak > 0, 1.0))
        return net.attention(deep, maps[-2], torch.stack(cams), valid)

    def classification(self, deep: Tensor, valid: Tensor, labels, known: list[int]) -> Tensor:
        total, count = deep.new_zeros(()), 0
        for b, one in enumerate(deep):
            logits = self.net.classifier(one[:, valid[b]].mean(dim=1))
            for c in known:
                p = logits[c].sigmoid()
                total = total - torch.log(p if c in labels[b] else 1 - p)
                count += 1
        return total / count

    def labelled(self, item: Batch) -> dict[str, Tensor]:
        maps = self.backbone(item.images, item.valid)
        valid = item.valid[:, 2::4, 2::4]
        target = torch.full_like(item.masks, IGNORE)
        for column, class_id in enumerate(self.trained):
            target[item.masks == class_id] = column

        def pixel_loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(resized(logits, (SIZE, SIZE)), target, ignore_index=IGNORE)

        refined = self.activation_logits(maps, named(item.labels, self.foreground), valid)
        decoded = self.net.decoder(maps[0], maps[-1])[:, self.trained]
        loss = self.classification(maps[-1], valid, item.labels, self.foreground)
        parts = {"seg": pixel_loss(decoded), "classification": loss}
        parts["activation"] = pixel_loss(refined)
        return {name: self.share["masks"] * part for name, part in parts.items()}

    def target(self, item: Batch, maps, valid: Tensor) -> Tensor:
        if item.supervision == "labels":
            shown = named(item.labels, self.foreground)
        else:
            means = [one[:, valid[b]].mean(dim=1) for b, one in enumerate(maps[-1])]
            logits = self.net.classifier(torch.stack(means))[:, self.foreground]
            shown = logits.sigmoid() >= self.config.shown_from
        p = self.net.decoder(maps[0], maps[-1])[:, self.trained]
        m = resized(self.activation_logits(maps, shown, valid), p.shape[-2:])
        fine = item.valid[:, 1::2, 1::2]
        return reference.calibrated(
            p, m, fine, self.config.gamma, self.config.temperature, self.config.centred
        )

    def unlabelled(self, item: Batch, clock: Clock) -> dict[str, Tensor]:
        maps, valid = self.backbone(item.images, item.valid), item.valid[:, 2::4, 2::4]
        losses = {}
        if item.supervision == "labels":  # class 1 has no masks: it takes no part
            loss = self.classification(maps[-1], valid, item.labels, [0, 3])
            losses["classification"] = self.share["labels"] * loss
        target = self.target(item, maps, valid).detach()
        view = strong_view(item.images, item.valid, clock.seed_for("strong view"))
        seen = item.valid & ~view.cut
        strong = self.backbone(view.images, seen)
        logits = self.net.decoder(strong[0], strong[-1])[:, self.trained]
        seen = seen[:, 1::2, 1::2]
        losses["unlabelled"] = self.share["u"] * reference.soft_loss(logits, target, seen, seen)
        return losses


@pytest.mark.parametrize("source", ["masks", "weak", "unlabelled"])
def test_a_slot_equals_its_equations_with_gradients(source):
    method = build(replace(SMALL, shown_from=0.49, gamma=0.3, temperature=0.7))
    with torch.no_grad():  # so that fusion has something to fuse
        method.net.decoder.classify.weight.normal_()
    slow, item, clock = BySteps(method), batch(source), Clock(3, 1, 4, num_steps=10)
    expected = slow.labelled(item) if source == "masks" else slow.unlabelled(item, clock)
    found = method(item, clock)
    assert set(found) == set(expected)
    parameters = list(method.parameters())
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-6, atol=1e-9)
        pair = [
            torch.autograd.grad(of[name], parameters, retain_graph=True, allow_unused=True)
            for of in (found, expected)
        ]
        for one, other in zip(*pair, strict=True):
            assert (one is None) == (other is None) or not (other if one is None else one).any()
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def learners(method: PseudoSeg, loss: Tensor) -> set[str]:
    """The parts of the method that a loss has a gradient in."""
    named_parameters = dict(method.named_parameters())
    gradients = torch.autograd.grad(
        loss, list(named_parameters.values()), retain_graph=True, allow_unused=True
    )
    parts = set()
    for name, gradient in zip(named_parameters, gradients):
        if gradient is not None and gradient.any():
            parts.add(name.split(".")[0] if name.startswith("backbone") else name.split(".")[1])
    return parts


def test_each_loss_teaches_its_own_part():
    method = build(replace(SMALL, shown_from=0.0))
    labelled = method(batch("masks"), Clock(1))
    assert learners(method, labelled["seg"]) == {"backbone", "decoder"}
    assert learners(method, labelled["classification"]) == {"backbone", "classifier"}
    assert learners(method, labelled["activation"]) == {"attention"}
    weak = method(batch("weak"), Clock(1))
    assert learners(method, weak["classification"]) == {"backbone", "classifier"}
    for source in ("weak", "unlabelled"):
        loss = method(batch(source), Clock(1))["unlabelled"]
        assert learners(method, loss) == {"backbone", "decoder"}


def test_the_weak_view_teaches_nothing_through_the_pseudo_label(monkeypatch):
    """With a strong view that is blank, L_u has no gradient in the first convolution."""
    method, item = build(), batch("unlabelled")

    def blank(images, valid, seed, **options):
        return StrongView(torch.zeros_like(images, dtype=torch.double), torch.zeros_like(valid))

    monkeypatch.setattr("memseg_dist.methods.pseudoseg.method.strong_view", blank)
    loss = method(item, Clock(1))["unlabelled"]
    gradient = torch.autograd.grad(loss, method.backbone.convs[0].weight)[0]
    assert not gradient.any()


def test_three_forward_passes_for_a_labelled_and_an_unlabelled_slot():
    method = build()
    method(batch("masks"), Clock(1, 0))
    method(batch("unlabelled"), Clock(1, 1))
    assert method.backbone.num_forwards == 3


def test_the_strong_view_moves_no_statistics_unless_asked():
    for is_asked in (False, True):
        method = build(replace(SMALL, strong_statistics=is_asked))
        with recording(method, 0):
            method(batch("unlabelled"), Clock(1))
        norm = method.net.decoder.reduce[1]
        assert len(norm.slot_statistics.seen[0]) == 1 + is_asked


def test_the_weight_of_unlabelled_images_rises():
    method, item = build(replace(SMALL, warmup=0.5)), batch("unlabelled")
    weights = [method._ramp(Clock(step, num_steps=20)) for step in (0, 5, 10, 19)]
    assert weights == [0, 0.5, 1, 1]
    assert method(item, Clock(0, num_steps=20))["unlabelled"] == 0


def test_a_threshold_leaves_out_positions_but_not_from_the_denominator():
    item, clock = batch("unlabelled"), Clock(1)
    losses = {
        value: build(replace(SMALL, threshold=value))(item, clock)["unlabelled"].item()
        for value in (0.0, 0.45, 1.0)
    }
    assert losses[1.0] == 0 < losses[0.45] < losses[0.0]


def test_hard_labels_are_cross_entropy_with_the_argmax():
    method, item, clock = build(replace(SMALL, hard=True)), batch("unlabelled"), Clock(1)
    slow = BySteps(method)
    maps = method.backbone(item.images, item.valid)
    best = slow.target(item, maps, item.valid[:, 2::4, 2::4]).argmax(dim=1)
    view = strong_view(item.images, item.valid, clock.seed_for("strong view"))
    seen = item.valid & ~view.cut
    strong = method.backbone(view.images, seen)
    logits = method.net.decoder(strong[0], strong[-1])[:, slow.trained]
    wanted = F.cross_entropy(logits, best.masked_fill(~seen[:, 1::2, 1::2], IGNORE),
                             ignore_index=IGNORE)  # fmt: skip
    torch.testing.assert_close(method(item, clock)["unlabelled"], 4 / 3 * wanted)


@pytest.mark.parametrize("kind", ["decoder", "activation"])
def test_a_single_source_is_sharpened_without_calibration(kind, monkeypatch):
    method, item = build(replace(SMALL, pseudo_label=kind)), batch("weak")
    seen = {}

    def keep(self, batch, target, clock):
        seen["target"] = target
        return target.sum()

    monkeypatch.setattr(PseudoSeg, "_strong_loss", keep)
    method(item, Clock(1))
    maps = method.backbone(item.images, item.valid)
    logits = method.net.decode(maps)[:, method.net.trained]
    if kind == "activation":
        shown = named(item.labels, BySteps.foreground)
        refined = method.net.refine(maps, shown, item.valid[:, 2::4, 2::4])
        logits = resized(refined, logits.shape[-2:])
    squared = logits.softmax(dim=1) ** 2
    torch.testing.assert_close(seen["target"], squared / squared.sum(dim=1, keepdim=True))
    has_attention = any(name.startswith("net.attention") for name, _ in method.named_parameters())
    assert has_attention == (kind == "activation")


def test_pictures_show_every_source_of_the_label():
    method = build().eval()
    images = batch("unlabelled").images[:, :, :14, :15]  # no whole strides
    found = method.pseudo_labels(images)
    assert set(found) == {"decoder", "activation", "fused", "sharpened"}
    for probabilities in found.values():
        assert probabilities.shape == (2, 4, 7, 8)
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2, 7, 8).double())
    shown = method.maps(images, [BACKGROUND, 3])
    assert set(shown) == {"class activation", *found}
    torch.testing.assert_close(shown["fused"][1], found["fused"][1, 2])
    assert not shown["class activation"][0].any() and shown["class activation"][1].max() <= 1


@pytest.mark.parametrize("source", ["masks", "weak"])
def test_a_blanked_image_teaches_no_class_that_it_is_absent(source):
    """Its share of L_x is 0, whatever labels it has."""
    method = build().eval()  # a single image has no BatchNorm
    method.net.classifier.bias.data.normal_()  # a blank image has scores too
    item = batch(source)
    item.valid[1] = item.images[1] = 0
    item = replace(item, labels=(item.labels[0], ()))
    alone = replace(
        item,
        images=item.images[:1],
        valid=item.valid[:1],
        masks=None if item.masks is None else item.masks[:1],
        labels=item.labels[:1],
        keys=("a",),
    )
    both, one = (method(part, Clock(1))["classification"] for part in (item, alone))
    torch.testing.assert_close(both, one / 2)


def test_a_blanked_image_is_in_no_figure():
    method, item = build(replace(SMALL, shown_from=0.0)), batch("unlabelled")
    item.valid[1] = False
    method(item, Clock(1))
    assert method.tally._sums[:2].tolist() == [1, 1]


def test_figures_tell_how_sure_the_pseudo_labels_are():
    method = build(replace(SMALL, shown_from=1.0))
    method(batch("unlabelled"), Clock(1))
    method(batch("unlabelled"), Clock(1, idle=True))
    figures = method.summary(Clock(1))
    assert figures["pseudo_label/images_without_class"] == 1
    assert 0.25 < figures["pseudo_label/confidence"] < 1
    assert method.summary(Clock(1)) == {}


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("squares")
    write_squares(root / "masks", 8, 2, with_masks=True)
    write_squares(root / "weak", 8, 4, with_masks=False)
    write_squares(root / "val", 3, 4, with_masks=True)
    return root


def config_of(data, tmp_path, kinds: dict[str, str], **changes) -> RunConfig:
    base = larvseg_config(data, tmp_path)
    sources = tuple(
        replace(base.sources[0], name=name, path=str(data / name.split("-")[0]), supervision=kind)
        for name, kind in kinds.items()
    )
    validation = replace(base.validation, base=(), novel=(), exclude=("n2", "n3"))
    method = replace(SMALL, stages=(0, 1, 2))
    backbone = replace(base.backbone, options=base.backbone.options | {"depth": "3"})
    fields = {"sources": sources, "method": method, "backbone": backbone, "validation": validation}
    return replace(base, **fields | changes)


BOTH = {"masks": "masks", "masks-2": "none"}


@pytest.mark.parametrize(
    ("kinds", "method", "message"),
    [
        ({"masks": "none"}, {}, "no labelled image"),
        ({"masks": "masks"}, {}, "every source has supervision 'masks'"),
        (BOTH, {"pseudo_label": "none"}, "'masks-2' has no masks, and method.pseudo_label"),
        (BOTH, {"background": "sky"}, "method.background 'sky' is no class"),
        (BOTH, {"stages": (0, 1, 7)}, "stages (0, 1, 7) of backbone"),
        ({"weak": "masks", "masks": "none"}, {}, "samples have no mask"),
    ],
)
def test_bad_input_is_named(data, tmp_path, kinds, method, message):
    config = config_of(data, tmp_path, kinds)
    config = replace(config, method=replace(config.method, **method))
    with pytest.raises(ValueError) as error:
        space = build_label_space(config)
        build_method(config, space)
        from memseg_dist.data.loader import TrainLoader

        TrainLoader(config.sources, space, seed=0, cache_dir=config.cache_directory)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"), [("gamma", 1.5), ("temperature", 0.0), ("stages", (1, 2)), ("rates", ())]
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"method.{setting}"):
        replace(SMALL, **{setting: value})


def test_one_image_per_slot_is_too_few_for_the_pooled_branch(data, tmp_path):
    config = config_of(data, tmp_path, BOTH)
    sources = (config.sources[0], replace(config.sources[1], batch_per_slot=1))
    with pytest.raises(ValueError, match="'masks-2' has batch_per_slot 1"):
        build_method(replace(config, sources=sources), build_label_space(config))
