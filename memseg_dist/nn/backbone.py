"""Feature extractors: uint8 pictures in, the feature maps of the stages asked for out.

Any timm model by name, but "vgg16" and "resnet38" are our own: the nets of the weakly supervised
papers, with an output stride of 8.

    backbone = build_backbone(config, stages=(1, -1))
    low, high = backbone(images, valid)          # low is [B, backbone.stages[0].dim, h, w]

Shape letters: B images, H x W pixels, h x w positions, D channels.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d, resample_abs_pos_embed
from timm.models import FeatureInfo
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.hrnet import HighResolutionNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn
from tyro.constructors import PrimitiveConstructorSpec

from memseg_dist.checks import require
from memseg_dist.nn.batchnorm import record_batchnorm
from memseg_dist.nn.resnet38 import ResNet38
from memseg_dist.nn.vgg import Vgg16
from memseg_dist.nn.weights import fetch_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OWN_NETS: dict[str, type[nn.Module]] = {"vgg16": Vgg16, "resnet38": ResNet38}
_FEATURE_OPTIONS = ("feature_location",)
"""What timm's feature extractors take and its whole nets do not: see `BackboneConfig.options`."""


def _mapping(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=True))


_PAIRS = PrimitiveConstructorSpec[Mapping[str, str]](
    nargs="*",
    metavar="[KEY VALUE [KEY VALUE ...]]",
    instance_from_str=_mapping,
    is_instance=lambda value: isinstance(value, Mapping),
    str_from_instance=lambda pairs: [word for pair in pairs.items() for word in pair],
)
"""One flag for all pairs: a mapping that is not empty would be a flag per key, without help."""


@dataclass(frozen=True)
class BackboneConfig:
    """The feature extractor and the weights that it starts from."""

    name: str = "vit_base_patch16_224.augreg_in21k_ft_in1k"
    """timm model name: a ViT, Swin, ResNet, ConvNeXt, ...; vgg16 and resnet38 are this package's
    own, resnet38 without ImageNet weights."""
    pretrained: str = ""
    """'hub' (timm's own weights), '' for random weights, or a .safetensors file: one that
    `save_backbone` wrote, or the model.safetensors that timm or its hub has for this model (whole;
    its classifier is dropped). A ViT's position embedding is resized to fit. A .pth, .pt or .bin
    file holds pickled code and is refused; the error says how to convert it."""
    image_size: int = 512
    """Nominal picture size of a transformer: position embeddings are resized for other sizes, but
    a BEiT takes pictures of this size alone."""
    output_stride: int | None = None
    """8, 16 or 32 for convolutional nets (dilated as needed); None keeps the net's own."""
    last_stage: int | None = None
    """Feature stage to stop at, counted from 0: a smaller net. Stages that a method counts from the
    end are counted from this one; None: the net's own last."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block, linear from 0 at the first; vgg16 and resnet38 have
    none."""
    frozen_batchnorm: bool = False
    """Training keeps every BatchNorm's statistics, scale and shift as they were read: for small
    batches of a pretrained net. It needs `pretrained`: random weights have no statistics to keep.
    """
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from red, green and blue, of 0 to 1; what the weights were trained with."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Red, green and blue are divided by this after that."""
    options: Annotated[Mapping[str, str], _PAIRS] = field(default_factory=dict)
    """Further keyword arguments of the model, values as JSON, e.g. {"embed_dim": "192"}; of
    resnet38 {"frozen": "true"}, of vgg16 and resnet38 {"width": "0.25"}; of an HRNet
    {"feature_location": '""'} for its branches as they are. None that reads a file."""

    def __post_init__(self) -> None:
        is_known = self.output_stride in (None, 8, 16, 32)
        require(is_known, "backbone.output_stride", self.output_stride, "8, 16 or 32")
        for key in self.options:
            if key.startswith("pretrained") or key in ("checkpoint_path", "cache_dir"):
                raise ValueError(
                    f"backbone.options has '{key}', by which timm could unpickle a file; give "
                    "weights as backbone.pretrained, a .safetensors file or 'hub'"
                )


@dataclass(frozen=True)
class FeatureStage:
    """dim: channels of a feature map. stride: pixels per position."""

    dim: int
    stride: int


class Backbone(nn.Module):
    """Normalises uint8 pictures and gives the feature maps of some of a net's stages.

    Attributes: stages (in the order of the maps, the deepest last), dim and stride (those of the
    deepest), bf16 (whether the net runs under bfloat16 autocast; else autocast is off inside,
    whatever surrounds the call), channels_last (whether a net of convolutions gets its pictures as
    [B, H, W, 3] in memory, which its maps then follow; the weights are left as they are, so that
    no engine, optimizer or checkpoint sees strides).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: Any,
        indices: tuple[int, ...],
        mean,
        std,
        bf16: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.net: Any = net
        self.bf16, self.channels_last = bf16, channels_last
        self._is_transformer = not isinstance(net.feature_info, FeatureInfo)
        self._indices = indices
        info = FeatureInfo(net.feature_info, indices) if self._is_transformer else net.feature_info
        self.stages = tuple(map(FeatureStage, info.channels(), info.reduction()))
        self.dim, self.stride = self.stages[-1].dim, self.stages[-1].stride
        # an HRNet adds up maps of all its strides, whatever stages are asked for
        count = None if isinstance(net, HighResolutionNetFeatures) else indices[-1] + 1
        self._deepest_stride = max(stage["reduction"] for stage in info.info[:count])
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        """images: uint8 [B, 3, H, W]; valid: bool [B, H, W], where False the input is 0.

        Returns one fp32 map [B, D, h, w] per stage. All of them cover the picture filled up below
        and to the right, by zeros, to whole positions of the deepest.
        """
        if self.channels_last and not self._is_transformer:
            images = images.contiguous(memory_format=torch.channels_last)
        pixels = (images - self.mean) / self.std
        if valid is not None:
            pixels = pixels * valid[:, None]
        height, width = images.shape[-2:]
        below, right = -height % self._deepest_stride, -width % self._deepest_stride
        if below or right:
            pixels = F.pad(pixels, (0, right, 0, below))
        # no cache: torch 2.8 gives weights that it cast under no_grad to a later pass with gradient
        with torch.autocast(
            pixels.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False
        ):
            if self._is_transformer:
                maps = self.net.forward_intermediates(
                    pixels, indices=list(self._indices), norm=True, stop_early=True,
                    intermediates_only=True,
                )  # fmt: skip
            else:
                maps = self.net(pixels)
                if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
                    maps = [features.permute(0, 3, 1, 2) for features in maps]
        rows, columns = -(-height // self.stride), -(-width // self.stride)
        scales = [self.stride // stage.stride for stage in self.stages]
        return tuple(
            features[:, :, : rows * scale, : columns * scale].float()
            for features, scale in zip(maps, scales, strict=True)
        )

    def set_activation_checkpointing(self, enabled: bool) -> None:
        self.net.set_grad_checkpointing(enabled)


def build_backbone(
    config: BackboneConfig,
    stages: Sequence[int] = (-1,),
    *,
    bf16: bool = False,
    channels_last: bool = False,
) -> Backbone:
    """A net that gives the maps of `stages`, drawn from torch's random numbers or read.

    stages: ascending indices of timm's feature stages (a ViT's blocks, the entries of a
    convolutional net's or Swin's `feature_info`; the stages in the docstrings of vgg16 and
    resnet38), negative from the end. A ViT's maps all go through its final norm, as timm's
    `forward_intermediates(norm=True)` gives them. What comes behind the last of `stages` may stay
    in the net unused.

    ValueError for an unknown model name or stage, options that the net does not take, a missing or
    broken weight file, or weights that do not fit.
    """
    options = {key: json.loads(value) for key, value in config.options.items()}
    if config.output_stride is not None:
        options["output_stride"] = config.output_stride
    if config.drop_path and config.name.split(".")[0] not in OWN_NETS:
        options["drop_path_rate"] = config.drop_path
    try:
        net, indices = _build_net(config, options, stages)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error) or "the net does not take these"  # timm's assertions say nothing
        raise ValueError(f"backbone '{config.name}' with {options}: {reason}") from error
    if config.pretrained:
        _load_pretrained(net, config, options)
    if config.frozen_batchnorm:
        net = freeze_batch_norm_2d(net)
    backbone = Backbone(net, indices, config.mean, config.std, bf16, channels_last)
    return record_batchnorm(backbone)  # type: ignore[return-value]


def _build_net(
    config: BackboneConfig, options: dict[str, Any], stages: Sequence[int]
) -> tuple[nn.Module, tuple[int, ...]]:
    """The net with random weights, and its stages counted from 0."""
    family = config.name.split(".")[0]
    make = OWN_NETS.get(family) or partial(timm.create_model, config.name)
    if family not in OWN_NETS and not timm.is_model(family):
        nearest = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        raise ValueError(f"backbone '{config.name}' is no timm model; nearest: {nearest}")
    with torch.device("meta"):  # draws no random numbers: the net below gets the caller's first
        probe: Any = make(**_of_whole_net(options))
    count = len(probe.feature_info)
    if config.last_stage is not None:
        if not 0 <= config.last_stage < count:
            raise ValueError(
                f"backbone.last_stage {config.last_stage}: backbone '{config.name}' has the stages "
                f"0 to {count - 1}"
            )
        count = config.last_stage + 1
    indices = tuple(stage + count if stage < 0 else stage for stage in stages)
    if not indices or list(indices) != sorted(set(indices) & set(range(count))):
        raise ValueError(
            f"stages {tuple(stages)} of backbone '{config.name}': give one or more from {-count} "
            f"to {count - 1}, ascending, each once"
        )
    if family in OWN_NETS:
        more: dict[str, Any] = {"out_indices": indices}
    elif not hasattr(probe, "patch_embed"):
        more = {"features_only": True, "out_indices": indices}
    else:
        more = {"num_classes": 0} | _size_options(probe, config.image_size)
        if not hasattr(probe, "head_dist"):  # which cannot do without its two tokens
            more["global_pool"] = ""  # a pooled ViT would have its norm behind the pooling
    net = make(**more | options)
    if isinstance(net, EfficientNetFeatures | MobileNetV3Features):
        # they would run all blocks, whatever stages are asked for
        net.blocks = net.blocks[: max(stage["stage"] for stage in net.feature_info.get_dicts())]
    return net, indices


def _of_whole_net(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _FEATURE_OPTIONS}


def _size_options(net: Any, image_size: int) -> dict[str, Any]:
    """What tells a net of this kind its picture size, and to take other sizes too if it can."""
    if hasattr(net, "dynamic_img_size"):
        return {"img_size": image_size, "dynamic_img_size": True}
    is_sized = getattr(getattr(net, "patch_embed", None), "img_size", None) is not None
    return {"img_size": image_size} if is_sized else {}


def save_backbone(backbone: Backbone, path: str | Path) -> None:
    """Write the weights as a .safetensors file that `pretrained` takes."""
    save_file({k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}, path)


def _load_pretrained(net: Any, config: BackboneConfig, options: dict[str, Any]) -> None:
    """Weights of the same architecture. ValueError names the file and what does not fit."""
    fetch_weights(config.name, config.pretrained)
    saved = None if config.pretrained == "hub" else load_file(config.pretrained)
    try:
        if saved is not None and all(name.startswith("net.") for name in saved):
            weights = {name.removeprefix("net."): tensor for name, tensor in saved.items()}
            old, new = weights.get("pos_embed"), getattr(net, "pos_embed", None)
            if old is not None and new is not None and old.shape != new.shape:
                grid = net.patch_embed.grid_size
                weights["pos_embed"] = resample_abs_pos_embed(
                    old, new_size=grid, num_prefix_tokens=new.shape[1] - prod(grid)
                )
        else:
            weights = _timm_weights(net, config, options, saved)
        net.load_state_dict(weights)
    except RuntimeError as error:
        lines = [textwrap.shorten(line, 300) for line in str(error).splitlines()[:6]]
        raise ValueError(
            f"backbone weights '{config.pretrained}' do not fit '{config.name}': "
            f"{' '.join(lines)}; were they written with the same backbone name, options and stages?"
        ) from error


def _timm_weights(
    net: nn.Module,
    config: BackboneConfig,
    options: dict[str, Any],
    saved: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The net's weights out of timm's whole model, which timm itself loads: strictly, resizing.

    saved: the tensors of the file `config.pretrained`; None: from the hub.
    """
    more: dict[str, Any] = {}
    if config.name.split(".")[0] not in OWN_NETS:
        more = _size_options(net, config.image_size) | _of_whole_net(options)
    elif saved is not None:  # vgg16's names are timm's; its classifier is larger than all the rest
        return {name: saved[name] for name in net.state_dict() if name in saved}
    if saved is not None:
        names = timm.get_pretrained_cfg(config.name).classifier or ""  # type: ignore[union-attr]
        classifier = names if isinstance(names, str) else names[0]
        more["num_classes"] = len(saved.get(f"{classifier}.weight", ()))
        more["pretrained_cfg_overlay"] = {
            "file": config.pretrained, "num_classes": more["num_classes"], "label_offset": 0,
        }  # fmt: skip
    with torch.random.fork_rng():  # pretrained or not, what is built next draws the same numbers
        whole = timm.create_model(config.name, pretrained=True, **more)

    def key(name: str) -> str:
        """timm's feature nets say "stages_0" for "stages.0", a pooled ViT "fc_norm" for "norm"."""
        return name.removeprefix("fc_").replace(".", "_")

    found = {key(name): tensor for name, tensor in whole.state_dict().items()}
    return {name: found[key(name)] for name in net.state_dict() if key(name) in found}
