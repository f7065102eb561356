"""Eq. 11 - 17 against nested loops, the forms of fusion, and the heads around them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import mcibi as reference

from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.methods.mcibi.network import DatasetContext, Network, gather_codes
from memseg_dist.nn.attention import MapAttention
from memseg_dist.nn.backbone import FeatureStage
from memseg_dist.nn.batchnorm import commit_statistics, recording

SMALL = MCIBIConfig(dim=6, dropout=0.0, stages=(-2, -1), aux_heads=(), bins=(1, 2), rates=(1, 2))
STAGES = (FeatureStage(5, 4), FeatureStage(7, 8))
NUM_CLASSES = 4
ALL = torch.ones(NUM_CLASSES, dtype=torch.bool)


def network(config=SMALL, **changes) -> Network:
    torch.manual_seed(0)
    return Network(replace(config, **changes), STAGES, NUM_CLASSES).double()


def maps(requires_grad: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(1)
    sizes = [(2, 5, 6, 8), (2, 7, 3, 4)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=requires_grad) for s in sizes]


def parameters(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


# ---------------------------------------------------------------- Eq. 12 - 14


def test_what_a_pixel_gathers_equals_the_loops_with_gradient():
    torch.manual_seed(0)
    logits = torch.randn(2, NUM_CLASSES, 3, 2, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(NUM_CLASSES, 6, dtype=torch.float64)
    codes[1] = 0  # no vector yet
    found = gather_codes(logits, codes)
    memory = {k: codes[k] for k in (0, 2, 3)}
    wanted = torch.stack([reference.gathered(one, memory, 6) for one in logits])
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits, upstream)[0] for value in (found, wanted))
    )


def test_the_gradient_through_the_gather_is_that_of_finite_differences():
    """The official code overwrites M before the backward pass reads it."""
    module = DatasetContext(SMALL, 6, NUM_CLASSES).double()
    codes = torch.randn(NUM_CLASSES, 6, dtype=torch.float64)
    pixels = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, codes, ALL), (pixels,))
    logits = torch.randn(1, NUM_CLASSES, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_codes(x, codes), (logits,))


def test_attention_equals_the_loops_with_gradient():
    torch.manual_seed(0)
    attention = MapAttention(6, 4).double()
    query = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    found = attention(query, key)
    parts = zip(attention.query(query), attention.key(key), attention.value(key))
    wanted = attention.out(torch.stack([reference.attended(*part) for part in parts]))
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (query, key), upstream, retain_graph=True),
        torch.autograd.grad(wanted, (query, key), upstream),
    ):
        torch.testing.assert_close(one, other)


def test_detached_weights_reach_no_h1():
    codes = torch.randn(NUM_CLASSES, 6, dtype=torch.float64)
    pixels = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    for detach in (False, True):
        module = DatasetContext(replace(SMALL, detach_weights=detach), 6, NUM_CLASSES).double()
        fused, _ = module(pixels, codes, ALL)
        fused.square().sum().backward()
        gradients = [parameter.grad for parameter in module.classify.parameters()]
        assert all(gradient is None for gradient in gradients) == detach


# ---------------------------------------------------------------- Eq. 4


@pytest.mark.parametrize("fusion", ["concat", "add", "weighted_add"])
def test_the_forms_of_fusion(fusion):
    torch.manual_seed(0)
    module = DatasetContext(replace(SMALL, fusion=fusion), 6, NUM_CLASSES).double()
    codes = torch.randn(NUM_CLASSES, 6, dtype=torch.float64)
    pixels = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    fused, logits = module(pixels, codes, ALL)
    context = module.attention(pixels, gather_codes(logits, codes))
    joined = {
        "concat": lambda: torch.cat([pixels, context], dim=1),
        "add": lambda: pixels + context,
        "weighted_add": lambda: sum(
            weight * part
            for weight, part in zip(
                module.weigh(torch.cat([pixels, context], dim=1)).softmax(dim=1).split(1, dim=1),
                (pixels, context),
            )
        ),
    }[fusion]()
    torch.testing.assert_close(fused, module.fuse(joined))


@pytest.mark.parametrize("form", ["attention", "concat"])
def test_context_within_the_image_is_fused_after_that_of_the_data_set(form):
    net, seen = network(context="ppm", context_fusion=form), maps()
    outputs = net(seen)
    pixels = net.reduce(seen[-1])
    fused, _ = net.dataset(pixels, net.codes, ALL)
    context = net.context(seen)
    if form == "attention":
        context = net.context_attention(pixels, context)
    expected = net.classify(net.context_fuse(torch.cat([context, fused], dim=1)))
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.pixels, pixels)


# ---------------------------------------------------------------- segmenters and controls


@pytest.mark.parametrize("memory", ["features", "zero", "random", "learnable", "image", "off"])
@pytest.mark.parametrize("context", ["none", "ppm", "aspp", "ocr", "uper"])
def test_every_context_with_and_without_every_kind_of_memory(context, memory):
    net = network(context=context, memory=memory, aux_heads=(0,))
    outputs = net(maps(requires_grad=True))
    size = (6, 8) if context == "uper" else (3, 4)
    assert outputs.logits.shape == (2, NUM_CLASSES, *size)
    assert outputs.pixels.shape == (2, 6, *size)
    assert [logits.shape for logits in outputs.auxiliary] == [(2, NUM_CLASSES, 6, 8)]
    assert (outputs.distribution is None) == (memory == "off")
    total = outputs.logits.square().sum() + sum(o.square().sum() for o in outputs.auxiliary)
    if outputs.distribution is not None:
        total = total + outputs.distribution.square().sum()
    total.backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    assert not unused, unused


def test_controls_have_the_graph_of_the_memory():
    """The same weights at the start, but for the codes that are learned."""
    kinds = ("features", "zero", "random", "learnable", "image")
    nets = {kind: network(memory=kind) for kind in kinds}
    weights = {
        kind: {name: p for name, p in net.named_parameters() if name != "codes"}
        for kind, net in nets.items()
    }
    for found in weights.values():
        assert found.keys() == weights["features"].keys()
        assert all(torch.equal(found[name], p) for name, p in weights["features"].items())
    plain = dict(network(memory="off").named_parameters())
    assert torch.equal(plain["reduce.0.weight"], weights["features"]["reduce.0.weight"])
    assert [k for k, net in nets.items() if "codes" in dict(net.named_parameters())] == [
        "learnable"
    ]
    seen = maps()
    outputs = {kind: net.eval()(seen).logits for kind, net in nets.items()}
    torch.testing.assert_close(outputs["features"], outputs["zero"])  # nothing is in it yet
    for kind in ("random", "image"):
        assert not torch.allclose(outputs[kind], outputs["zero"])


def test_learned_codes_learn_and_random_ones_do_not():
    for kind in ("random", "learnable"):
        net = network(memory=kind)
        assert 0.5 < net.codes.std() < 1.5
        net(maps()).logits.square().sum().backward()
        assert (net.codes.grad is not None and net.codes.grad.any()) == (kind == "learnable")


def test_classes_that_nobody_trains_get_nothing_of_w():
    """Validation-only classes, and those that a source excludes."""
    torch.manual_seed(0)
    net = Network(SMALL, STAGES, NUM_CLASSES, torch.tensor([0, 2])).double()
    net.codes.normal_()
    net.is_set.copy_(torch.tensor([True, False, True, False]))
    outputs = net(maps())
    share = outputs.distribution.softmax(dim=1)
    assert not share[:, [1, 3]].any()
    before = outputs.logits
    net.codes[[1, 3]] += 5
    torch.testing.assert_close(net(maps()).logits, before)
    rows = net.classify(net.codes[:, :, None, None], by_running_statistics=True)[:, [0, 2], 0, 0]
    wanted = torch.nn.functional.cross_entropy(rows[[0, 2]], torch.tensor([0, 1]))
    loss = net.consistency_loss()
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.classify.parameters())


def test_object_regions_are_the_last_auxiliary_heads():
    net, seen = network(context="ocr", aux_heads=(0, 1)), maps()
    outputs = net(seen)
    pixels = net.reduce(seen[-1])
    fused, _ = net.dataset(pixels, net.codes, ALL)
    context = net.context_attention(pixels, net.context(seen, outputs.auxiliary[1]))
    expected = net.classify(net.context_fuse(torch.cat([context, fused], dim=1)))
    torch.testing.assert_close(outputs.logits, expected)


def test_own_pixels_instead_of_codes_are_non_local_attention():
    net, seen = network(memory="image"), maps()
    pixels = net.reduce(seen[-1])
    context = net.dataset.attention(pixels, pixels)
    fused = net.dataset.fuse(torch.cat([pixels, context], dim=1))
    torch.testing.assert_close(net(seen).logits, net.classify(fused))


def test_all_stages_are_joined_at_the_size_of_the_finest():
    net, seen = network(pixels="all"), maps()
    assert net(seen).logits.shape[-2:] == (6, 8)
    large = torch.nn.functional.interpolate(seen[1], (6, 8), mode="bilinear")
    torch.testing.assert_close(net(seen).pixels, net.reduce(torch.cat([seen[0], large], dim=1)))
    assert network(pixels="all", downsample=True)(seen).logits.shape[-2:] == (3, 4)


def test_the_papers_numbers_of_parameters():
    """Table 3: DCA without H1, ASPP, PPM. (For both together ours is the code's, 62.4 M.)"""
    stages = [FeatureStage(1024, 8), FeatureStage(2048, 8)]
    millions = {}
    with torch.device("meta"):
        for context in ("none", "aspp", "ppm"):
            config = MCIBIConfig(context=context, stages=(-2, -1))
            net = Network(config, stages, 150)
            if net.context is None:
                dataset = net.dataset
                parts = parameters(net.reduce) + parameters(dataset) - parameters(dataset.classify)
            else:
                parts = parameters(net.context)
            millions[context] = round(parts / 1e6, 2)
    assert millions == {"none": 14.82, "aspp": 42.21, "ppm": 23.07}


# ---------------------------------------------------------------- Eq. 15, 17


def prepared(**changes) -> Network:
    net = network(**changes)
    torch.manual_seed(2)
    net.codes.copy_(torch.randn(NUM_CLASSES, 6))
    net.is_set.copy_(torch.tensor([True, False, True, True]))
    net.codes[1] = 0
    net.classify.norm.running_mean.normal_()
    net.classify.norm.running_var.uniform_(0.5, 2)
    return net


def test_consistency_equals_the_loops_and_teaches_h2_alone():
    net = prepared()
    loss = net.consistency_loss()
    net.eval()
    rows = {k: net.classify(net.codes[k][None, :, None, None])[0, :, 0, 0] for k in (0, 2, 3)}
    torch.testing.assert_close(loss, reference.consistency_loss(rows))
    loss.backward()
    assert all(p.grad is not None for p in net.classify.parameters())
    others = [p for name, p in net.named_parameters() if not name.startswith("classify.")]
    assert all(p.grad is None for p in others)


def test_consistency_leaves_the_running_statistics_to_the_pixels():
    for norm, moves in (("running", False), ("batch", True)):
        net = prepared(consistency_norm=norm)
        before = net.classify.norm.running_mean.clone()
        with recording(net, 0):
            net.consistency_loss()
        commit_statistics(net)
        assert torch.equal(net.classify.norm.running_mean, before) != moves


def test_consistency_with_the_statistics_of_m_is_the_codes():
    net = prepared(consistency_norm="batch")
    loss = net.consistency_loss()
    logits = net.classify(net.codes[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(loss, reference.consistency_loss({k: logits[k] for k in (0, 2, 3)}))


def test_before_anything_is_remembered_consistency_costs_nothing():
    net = network()
    loss = net.consistency_loss()
    assert loss == 0
    loss.backward()


# ---------------------------------------------------------------- what does not fit


def test_heads_that_do_not_fit_the_stages_are_errors():
    one = STAGES[-1:]
    with pytest.raises(ValueError, match="context 'uper' joins the maps of several stages"):
        Network(replace(SMALL, stages=(-1,), context="uper"), one, NUM_CLASSES)
    with pytest.raises(ValueError, match=r"method.pixels 'all'.*method.stages \(-1,\)"):
        Network(replace(SMALL, stages=(-1,), pixels="all"), one, NUM_CLASSES)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"context": "ocr", "aux_heads": ()}, "aux_heads is empty"),
        ({"aux_heads": (2,)}, r"method.aux_heads is \(2,\).*-2 .. 1"),
        ({"aux_heads": (1, -1)}, "each once"),
        ({"stages": ()}, "method.stages"),
        ({"bins": ()}, "method.bins"),
        ({"rates": (0, 3)}, "method.rates"),
        ({"momentum": 1.5}, r"method.momentum is 1.5"),
        ({"dim": 0}, "method.dim"),
        ({"downsample": True}, "method.downsample halves the joined map of method.pixels 'all'"),
        ({"consistency_weight": -1.0}, "method.consistency_weight"),
    ],
)
def test_settings_that_cannot_be_are_errors(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(SMALL, **changes)
