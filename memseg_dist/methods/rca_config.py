"""The settings of RCA, and the preset that does as its public code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from memseg_dist.losses.mixup import MixupPair
from memseg_dist.losses.regions import RegionMask
from memseg_dist.memory.region_bank import Keying
from memseg_dist.memory.table import TableKind
from memseg_dist.models.aggregation import AttentionScale
from memseg_dist.models.cam import CamHead


@dataclass(frozen=True)
class RCAConfig:
    """Settings of the method; the defaults are the paper's, completed as `methods.rca` says."""

    kind: Literal["rca"] = "rca"
    contrast_weight: float = 0.01
    """alpha_1; 0: no semantic contrast (RSC)."""
    intermediate_weight: float = 0.4
    """alpha_2, of the loss of the intermediate map P."""
    aggregation: Literal["attention", "linear", "off"] = "attention"
    """How prototypes are read (RSA): softmax attention, the code's linear form, or not at all."""
    attention_scale: AttentionScale = "sqrt_dim"
    attention_temperature: float = 0.07
    """Of the attention with scale "cosine"."""
    saliency_weight: float = 0.0
    """Of the saliency-supervised loss of EPS on O; above 0 both maps get a background channel, and
    every source needs `saliency`."""
    saliency_overlap: float = 0.4
    """EPS: a class whose map overlaps less with the saliency is on the background's side."""
    saliency_foreground: float = 0.5
    """EPS: the share of the foreground in the estimated saliency (VOC 0.5, COCO 0.9)."""
    head: CamHead = "linear"
    """Layers of F_CAM for P."""
    final_head: CamHead = "linear"
    """Layers of F_CAM for O."""
    head_width: int = 512
    """Channels of the heads' 3 x 3 convolutions."""
    reduce_to: int | None = None
    """A 1 x 1 convolution to so many channels before memory and aggregation (for D = 4096)."""
    projector: bool = False
    """The code's two 3 x 3 convolutions on the query side of the contrast alone."""
    region_mask: RegionMask = "mean"
    momentum: float = 0.99
    """gamma of Eq. 3: the weight of what is remembered."""
    gate: float = 0.7
    """nu: a region with a lower score does not change the memory."""
    gate_by: Literal["output", "intermediate"] = "output"
    """The score: sigmoid of the final map's mean (the code), or the bare mean of P (the paper)."""
    temperature: float = 0.07
    """tau of Eq. 4."""
    contrast_reduction: Literal["mean", "sum"] = "mean"
    """Over the images of a slot."""
    warmup_epochs: int = 1
    """Epochs without contrast."""
    mixup: bool = True
    mixup_beta: float = 8.0
    """omega ~ Beta(beta, beta)."""
    mixup_pair: MixupPair = "other_class"
    mixup_scope: Literal["batch", "slot"] = "batch"
    """Where the partner is drawn from. "slot" saves the preview that several slots need."""
    keying: Keying = "image"
    capacity: int | None = None
    """Rows per class: None for a row per image (keying "ring": 500)."""
    noise: bool = False
    """Rows and prototypes start as N(0, 1) and count as set."""
    memory_table: TableKind = "sharded"
    num_prototypes: int | None = 10
    """K; None: every row is a prototype."""
    prototype_steps: int | None = None
    """Steps between two clusterings; None: one epoch."""
    kmeans_starts: int = 1
    map_size: int = 46
    """Side of the accumulated activation maps; 0: none are kept."""
    map_gate: float = 0.1
    """A map is accumulated if sigmoid(GAP(O)) of its class is at least this."""

    def __post_init__(self) -> None:
        wrong = {
            "contrast_weight": self.contrast_weight < 0,
            "saliency_weight": self.saliency_weight < 0,
            "temperature": self.temperature <= 0,
            "attention_temperature": self.attention_temperature <= 0,
            "intermediate_weight": self.intermediate_weight < 0,
            "saliency_overlap": not 0 <= self.saliency_overlap <= 1,
            "saliency_foreground": not 0 <= self.saliency_foreground <= 1,
            "head_width": self.head_width < 1,
            "reduce_to": self.reduce_to is not None and self.reduce_to < 1,
            "warmup_epochs": self.warmup_epochs < 0,
            "kmeans_starts": self.kmeans_starts < 1,
            "momentum": not 0 <= self.momentum <= 1,
            "mixup_beta": self.mixup_beta <= 0,
            "num_prototypes": self.num_prototypes is not None and self.num_prototypes < 1,
            "prototype_steps": self.prototype_steps is not None and self.prototype_steps < 1,
            "capacity": self.capacity is not None and self.capacity < 1,
            "map_size": self.map_size < 0,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise ValueError(f"method.{name} is {getattr(self, name)!r}: out of range")
        if self.noise and self.keying != "ring":
            raise ValueError(
                "method.noise with method.keying 'image': a row that no image wrote would be read; "
                "use --method.keying ring, as the released code"
            )


RING_CAPACITY = 500
"""Rows per class of the code's rings."""


def released(config: RCAConfig | None = None) -> RCAConfig:
    """`config` with every choice that `methods.rca` lists as the public code has it.

    Its mixup partner is drawn a little otherwise: it permutes the images of a batch and then draws
    one of the partner's classes, here the region is drawn at once.
    """
    return replace(
        config or RCAConfig(),
        aggregation="linear",
        head="trunk",
        final_head="per_class",
        projector=True,
        region_mask="softmax",
        contrast_reduction="sum",
        warmup_epochs=2,
        kmeans_starts=10,
        mixup_pair="any",
        mixup_scope="slot",
        keying="ring",
        noise=True,
    )
