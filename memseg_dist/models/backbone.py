"""Feature extractors: uint8 pictures in, one feature map out.

Any timm model by name, but "vgg16" and "resnet38" are our own: the nets of the weakly supervised
papers, with an output stride of 8.

Shape letters: B images, H x W pixels, h x w positions, D channels.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memseg_dist.models.batchnorm import record_batchnorm
from memseg_dist.models.resnet38 import ResNet38
from memseg_dist.models.vgg import Vgg16

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneConfig:
    name: str = "vit_base_patch16_224.augreg_in21k_ft_in1k"
    """timm model name: a ViT, ResNet, ConvNeXt, ...; vgg16 and resnet38 are this package's own."""
    pretrained: str = ""
    """'hub' (timm's own weights), a .safetensors file, or '' for random weights."""
    image_size: int = 512
    """Nominal picture size of a ViT's position embedding, which is resized for other sizes."""
    output_stride: int | None = None
    """8, 16 or 32 for convolutional nets (dilated as needed); None keeps the net's own."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block, linear from 0 at the first; vgg16 and resnet38 have
    none."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    options: Mapping[str, str] = field(default_factory=dict)
    """Further keyword arguments of the model, values as JSON, e.g. {"embed_dim": "192"}; of
    resnet38 {"frozen": "true"}, of vgg16 and resnet38 {"width": "0.25"}."""


TRANSFORMER_MODULES = tuple(
    f"timm.models.{name}" for name in ("vision_transformer", "deit", "eva", "beit")
)


class LastBlock(nn.Module):
    """A vision transformer as a feature map: last block, final norm, no prefix tokens."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.net.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)

    def set_grad_checkpointing(self, enabled: bool) -> None:
        self.net.set_grad_checkpointing(enabled)


class Backbone(nn.Module):
    """Normalises uint8 pictures and gives the last feature map [B, D, h, w].

    Attributes: dim (D), stride (pixels per position at the nominal size).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, dim: int, stride: int, mean, std) -> None:
        super().__init__()
        self.net: Any = net
        self.dim, self.stride = dim, stride
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """images: uint8 [B, 3, H, W]; valid: bool [B, H, W], where False the input is 0."""
        pixels = (images - self.mean) / self.std
        if valid is not None:
            pixels = pixels * valid[:, None]
        height, width = images.shape[-2:]
        below, right = -height % self.stride, -width % self.stride
        if below or right:
            pixels = F.pad(pixels, (0, right, 0, below))
        return self.net(pixels)[-1]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        self.net.set_grad_checkpointing(enabled)


def build_backbone(config: BackboneConfig) -> Backbone:
    """ValueError for an unknown model name, a missing weight file or weights that do not fit."""
    options = {key: json.loads(value) for key, value in config.options.items()}
    if config.output_stride is not None:
        options["output_stride"] = config.output_stride
    try:
        if config.name.split(".")[0] == "vgg16":
            net, dim, stride = _vgg16(config, options)
        elif config.name == "resnet38":
            net, dim, stride = _resnet38(config, options)
        else:
            net, dim, stride = _timm(config, options)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"backbone '{config.name}' with {options}: {error}") from error
    backbone = Backbone(net, dim, stride, config.mean, config.std)
    if config.pretrained not in ("", "hub"):
        load_backbone(backbone, config.pretrained)
    return record_batchnorm(backbone)  # type: ignore[return-value]


def _vgg16(config: BackboneConfig, options: dict) -> tuple[nn.Module, int, int]:
    net = Vgg16(**options)
    if config.pretrained == "hub":
        whole: Any = timm.create_model(config.name, pretrained=True)
        net.features.load_state_dict(whole.features.state_dict())
    return net, net.dim, net.stride


def _resnet38(config: BackboneConfig, options: dict) -> tuple[nn.Module, int, int]:
    if config.pretrained == "hub":
        raise ValueError(
            "backbone.pretrained is 'hub', but no hub has resnet38; give a .safetensors file of it"
        )
    net = ResNet38(**options)
    return net, net.dim, net.stride


def _timm(config: BackboneConfig, options: dict) -> tuple[nn.Module, int, int]:
    if not timm.is_model(config.name.split(".")[0]):
        nearest = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        raise ValueError(f"backbone '{config.name}' is no timm model; nearest: {nearest}")
    options = options | {"pretrained": config.pretrained == "hub"}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if timm.model_entrypoint(config.name).__module__ in TRANSFORMER_MODULES:
        return _transformer(config, options)
    return _convolutional(config, options)


def _transformer(config: BackboneConfig, options: dict) -> tuple[nn.Module, int, int]:
    options = {"img_size": config.image_size, "dynamic_img_size": True} | options
    net: Any = timm.create_model(config.name, num_classes=0, global_pool="", **options)
    return LastBlock(net), net.embed_dim, net.patch_embed.patch_size[0]


def _convolutional(config: BackboneConfig, options: dict) -> tuple[nn.Module, int, int]:
    net: Any = timm.create_model(config.name, features_only=True, out_indices=[-1], **options)
    return net, net.feature_info.channels()[-1], net.feature_info.reduction()[-1]


def save_backbone(backbone: Backbone, path: str | Path) -> None:
    """Write the weights as a .safetensors file that `pretrained` takes."""
    save_file({k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}, path)


def load_backbone(backbone: Backbone, path: str | Path) -> None:
    """Read weights of the same architecture; a ViT's position embedding is resized to fit.

    ValueError names the file and the tensors that are missing, left over or of another shape.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"backbone weights '{path}' do not exist; give a .safetensors file or 'hub'"
        )
    saved = load_file(path)
    wanted = backbone.state_dict()
    for name, tensor in saved.items():
        if name.endswith("pos_embed") and name in wanted and tensor.shape != wanted[name].shape:
            saved[name] = _resize_position_embedding(tensor, wanted[name].shape[1])
    missing, left_over = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    reshaped = [k for k in wanted.keys() & saved.keys() if wanted[k].shape != saved[k].shape]
    if missing or left_over or reshaped:
        raise ValueError(
            f"backbone weights '{path}' do not fit: {len(missing)} missing (first {missing[:3]}), "
            f"{len(left_over)} left over (first {left_over[:3]}), {len(reshaped)} of another shape "
            f"(first {reshaped[:3]}); was it written with the same backbone name and options?"
        )
    backbone.load_state_dict(saved)


def _resize_position_embedding(embedding: Tensor, num_tokens: int) -> Tensor:
    """[1, prefix + n * n, D] -> [1, prefix + m * m, D], bicubic."""
    num_prefix = embedding.shape[1] - int(embedding.shape[1] ** 0.5) ** 2
    old, new = (int((count - num_prefix) ** 0.5) for count in (embedding.shape[1], num_tokens))
    prefix, grid = embedding[:, :num_prefix], embedding[:, num_prefix:]
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([prefix, grid.flatten(2).mT], dim=1)
