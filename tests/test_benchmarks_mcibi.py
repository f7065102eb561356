"""What the benchmarks of MCIBI count, against the paper's figures and counts by hand."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memseg_dist.batch import IGNORE
from memseg_dist.methods.mcibi.statistics import class_sums
from memseg_dist.nn.attention import MapAttention


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def complexity(benchmark):
    return benchmark("complexity")


@pytest.mark.parametrize("name", ["ASPP", "PPM", "DCA"])
def test_parameters_and_convolutions_are_the_papers(complexity, name):
    found = complexity.count(name, 128, 512, 150)
    parameters, flops, _ = complexity.PAPER[name]
    assert round(found["parameters"] / 1e6, 2) == parameters
    assert found["convolutions"] / 1e9 == pytest.approx(flops, rel=1e-3)


def test_aspp_with_dca_is_larger_than_the_papers_and_its_1x1_form_is_not(complexity):
    found = complexity.count("ASPP + DCA", 128, 512, 150)
    assert found["parameters"] / 1e6 == pytest.approx(62.4, abs=0.05)
    smaller = 8 * (2048 * 512 + 2 * 1024 * 512)  # three 3 x 3 convolutions become 1 x 1
    parameters, flops, _ = complexity.PAPER["ASPP + DCA"]
    assert (found["parameters"] - smaller) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert (found["convolutions"] - smaller * 128**2) / 1e9 == pytest.approx(flops, rel=1e-3)


def test_multiply_adds_of_a_tiny_dca_by_hand(complexity):
    size, dim, classes = 3, 4, 5
    inner, positions = dim // 2, size**2
    reduce, fuse = 9 * 2048 * dim, 9 * 2 * dim * dim
    attention = 2 * (dim * inner + inner * inner) + 2 * dim * inner  # two layers in g_q and in g_k
    convolutions = positions * (reduce + fuse + attention)
    products = positions * classes * dim + 2 * positions**2 * inner
    found = complexity.count("DCA", size, dim, classes)
    assert (found["convolutions"], found["all"]) == (convolutions, convolutions + products)
    h1 = positions * (dim * dim + dim * classes)
    assert complexity.count("DCA + H1", size, dim, classes)["all"] - found["all"] == h1
    non_local = complexity.count("non-local", size, dim, classes)
    assert found["all"] - non_local["all"] == positions * classes * dim


def test_attention_runs_in_a_fused_kernel():
    """Which needs the channels side by side, and else keeps [N, N] without a word."""
    attention, map = MapAttention(16, 8).eval(), torch.randn(1, 16, 4, 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(map, map)
    names = {str(key) for key in counter.get_flop_counts()["Global"]}
    assert any("flash_attention" in name for name in names) and not any("bmm" in n for n in names)


def test_every_module_runs_and_a_bound_on_memory_halves_the_side(complexity):
    options = complexity.Complexity(size=4, dim=8, classes=5, repeats=1)
    for name in complexity.MODULES:
        net = complexity.build(name, 4, 8, 5)
        assert not any(
            isinstance(layer, nn.Dropout2d) and layer.training for layer in net.modules()
        )
        with torch.no_grad():
            fused = net(complexity.draw_maps(net, 4, "cpu")).logits
        assert fused.shape == (1, 8, *(2 * (8,) if name == "UPerNet" else 2 * (4,)))
    assert complexity.fitting_size(options, mebibytes_per_position=100) == 4
    options = complexity.Complexity(size=4, memory_gb=0.5)
    assert complexity.fitting_size(options, mebibytes_per_position=100) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_literal_update_is_class_sums(benchmark, dtype):
    feature_memory = benchmark("feature_memory")
    options = feature_memory.FeatureMemory(size=(32, 48), classes=7, dim=6)
    features, target, memory, is_set = feature_memory.draw_inputs(options)
    assert (target == IGNORE).any() and not is_set[target.clamp_min(0)].all()
    inputs = (features.to(dtype), target, memory.to(dtype), is_set)
    torch.testing.assert_close(feature_memory.literal(*inputs), class_sums(*inputs))


def test_the_literal_update_waits_for_every_class_and_ours_never(benchmark):
    feature_memory = benchmark("feature_memory")
    options = feature_memory.FeatureMemory(size=(32, 32), classes=7, dim=6)
    _, target, *_ = feature_memory.draw_inputs(options)
    classes = target.unique()
    waits = feature_memory.count_waits("literal", options)
    assert waits == 2 + 2 * len(classes[classes != IGNORE])
    assert feature_memory.count_waits("ours", options) == 0
