"""What the runs with MCIBI's published settings share: the nets, the options, the optimizer.

A slot is a micro-batch on one worker, and BatchNorm normalises within it, where the paper's SyncBN
spans its 8 GPUs. So slots hold 8 images (4 of Cityscapes): their memory was not measured; they are
meant for GPUs of 80 GB, and any number of workers shares them. For smaller ones, --engine.precision
bf16 and --engine.activation-checkpointing, or more slots of fewer images, --sources.0.slots 8
--sources.0.batch-per-slot 2, whose BatchNorm sees two.

The presets are of the method (methods/mcibi/config.py), and "paper" decays the rate to 0, the other
two to 1 % of its start. Nets, their weights and the way of testing are the same in all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from memseg_dist.config import (
    Intervals,
    LaunchConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from memseg_dist.data.loader import Source
from memseg_dist.methods.mcibi.config import MCIBIConfig, paper, released
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.nn.context import ContextKind
from memseg_dist.pipeline import JobOptions

NetName = Literal[
    "resnet50", "resnet101", "resnest101", "hrnet_w48", "vit_large", "swin_large", "convnext_base"
]
Preset = Literal["decided", "paper", "released"]
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class Net:
    """A backbone, and what MCIBI's settings and the optimizer's are with it."""

    backbone: BackboneConfig
    method: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    context: ContextKind = "aspp"


def _hub(name: str, output_stride: int | None = None, **fields: Any) -> BackboneConfig:
    fields = {"drop_path": 0.0} | fields
    return BackboneConfig(name, "hub", output_stride=output_stride, **fields)


NETS: dict[NetName, Net] = {
    # with the stem of three 3 x 3 convolutions
    "resnet50": Net(_hub("resnet50c.gluon_in1k", 8)),
    "resnet101": Net(_hub("resnet101c.gluon_in1k", 8)),
    "resnest101": Net(_hub("resnest101e.in1k", 8)),
    # its four branches as they are, 48 + 96 + 192 + 384 channels at stride 4
    "hrnet_w48": Net(
        _hub("hrnet_w48.ms_in1k", options={"feature_location": '""'}),
        {"pixels": "all", "aux_heads": ()},
    ),
    # stride 16; the dropout is the code's
    "vit_large": Net(
        _hub(
            "vit_large_patch16_384.augreg_in21k_ft_in1k",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            options={"pos_drop_rate": "0.1", "proj_drop_rate": "0.1"},
        ),
        {"stages": (9, 14, 19, 23), "rates": (6, 12, 18), "aux_heads": (-4, -3, -2)},
        {"weight_decay": 0.0, "backbone_lr_scale": 0.1},
    ),
    # not in the paper: optimizers as their authors train UPerNet
    "swin_large": Net(
        _hub("swin_large_patch4_window12_384.ms_in22k", drop_path=0.3),
        optimizer={"kind": "adamw", "lr": 6e-5, "weight_decay": 0.01, "warmup_steps": 1500},
        context="uper",
    ),
    "convnext_base": Net(
        _hub("convnext_base.fb_in22k", drop_path=0.4),
        optimizer={"kind": "adamw", "lr": 1e-4, "weight_decay": 0.05, "warmup_steps": 1500},
        context="uper",
    ),
}


@dataclass(frozen=True)
class PaperOptions(JobOptions):
    """Options of the runs with the published settings. The data set's are a subclass."""

    net: NetName = "resnet50"
    """The backbone; swin_large and convnext_base are not in the paper."""
    context: Literal["auto"] | ContextKind = "auto"
    """Context within the image; auto: aspp (DeepLabV3), and uper with the nets that are not in the
    paper."""
    baseline: bool = False
    """The same segmenter without the memory."""
    preset: Preset = "decided"
    """Where paper and code differ: our decisions, the paper's text, or the public code."""
    multiscale: bool = False
    """Test as the paper's comparison with others does: scales 0.5 to 1.75 and mirror images, their
    probabilities averaged; at the end of training only."""


@dataclass(frozen=True)
class Schedule:
    """SGD, polynomial decay of power 0.9."""

    epochs: int
    lr: float
    weight_decay: float
    batch: int

    def steps(self, num_images: int) -> int:
        return self.epochs * num_images // self.batch


def mcibi_run(
    name: str,
    options: PaperOptions,
    schedule: Schedule,
    source: Source,
    validation: ValidationConfig,
    *,
    num_images: int,
    released_changes: Mapping[str, Any] | None = None,
    **method_changes: Any,
) -> RunConfig:
    """A run of `schedule` on all of `source`, whose slots are as many as the batch needs.

    released_changes: what the public code trains this data set with beyond `released`.
    method_changes: settings of MCIBI that the data set asks for, in every preset.
    """
    net = NETS[options.net]
    method = _method(options, released_changes or {}, net, method_changes)
    optimizer = {"lr": schedule.lr, "weight_decay": schedule.weight_decay} | net.optimizer
    floor = 0.0 if options.preset == "paper" else optimizer["lr"] / 100
    steps = schedule.steps(num_images)
    suffix = "" if options.preset == "decided" else f"_{options.preset}"
    slots, rest = divmod(schedule.batch, source.batch_per_slot)
    assert rest == 0, "a batch is whole slots"
    return RunConfig(
        name=f"{'baseline' if options.baseline else 'mcibi'}_{name}_{options.net}"
        f"_{method.context}{suffix}",
        storage="runs",
        sources=(replace(source, slots=slots),),
        method=method,
        backbone=net.backbone,
        validation=validation,
        steps=steps,
        # the weight decay of torch's SGD and of the public code knows no exceptions
        optimizer=OptimizerConfig(
            decay_norms_and_biases=optimizer.get("kind") != "adamw", min_lr=floor, **optimizer
        ),
        launch=LaunchConfig(workers=(1, slots)),
        every=Intervals(evaluate=steps if options.multiscale else 5000),
    )


def _method(
    options: PaperOptions, released_changes: Mapping[str, Any], net: Net, changes: Mapping[str, Any]
) -> MCIBIConfig:
    context = net.context if options.context == "auto" else options.context
    fields = {**net.method, **changes}
    if fields.get("pixels") == "all" and context == "uper":
        raise ValueError(
            f"--context uper reads the maps of several stages, and --net {options.net} joins its "
            "own to one; choose another context or net"
        )
    if fields.get("aux_heads") == () and context == "ocr":
        fields["aux_heads"] = (-1,)  # OCR's regions are a head's, here of the deepest branch
    method = MCIBIConfig(
        memory="off" if options.baseline else "features", context=context, **fields
    )
    if options.preset == "paper":
        return paper(method)
    return replace(released(method), **released_changes) if options.preset == "released" else method


def scene_validation(path: str, options: PaperOptions, *, slide: bool) -> ValidationConfig:
    """Of ADE20K and COCO-Stuff: the shortest side is 512; a ViT, or `slide`, looks at windows."""
    is_sliding = slide or options.net == "vit_large"
    validation = ValidationConfig(
        path,
        mode="slide" if is_sliding else "whole",
        resize=(2048, 512),
        window=512,
        stride=341,
    )
    return with_views(validation, options)


def with_views(validation: ValidationConfig, options: PaperOptions) -> ValidationConfig:
    """With `multiscale` at several scales and mirrored."""
    if not options.multiscale:
        return validation
    return replace(validation, scales=SCALES, flip=True, average="probabilities")
