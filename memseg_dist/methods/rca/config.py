"""The settings of RCA, what it can be trained with, and the preset that does as its public code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from memseg_dist.checks import (
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveInt,
    Share,
    check_numbers,
    require,
)
from memseg_dist.memory.layouts import TableKind
from memseg_dist.methods.method import Method, MethodConfig
from memseg_dist.methods.rca.aggregation import AttentionScale
from memseg_dist.methods.rca.cam import CamHead
from memseg_dist.methods.rca.mixup import MixupPair
from memseg_dist.methods.rca.regions import RegionMask

if TYPE_CHECKING:
    from memseg_dist.methods.setup import Setup

Keying = Literal["image", "ring"]


@dataclass(frozen=True)
class RCAConfig(MethodConfig):
    """Settings of the method; the defaults are the paper's, completed as `method` says."""

    kind: Literal["rca"] = "rca"
    contrast_weight: NotNegative = 0.01
    """alpha_1; 0: no semantic contrast (RSC)."""
    intermediate_weight: NotNegative = 0.4
    """alpha_2, of the loss of the intermediate map P."""
    aggregation: Literal["attention", "linear", "off"] = "attention"
    """How prototypes are read (RSA): softmax attention, the code's linear form, or not at all."""
    attention_scale: AttentionScale = "sqrt_dim"
    """Inner products of the attention: divided by the root of their dimension, as they are (the
    paper), or of unit vectors over a temperature."""
    attention_temperature: Positive = 0.07
    """Of the attention with scale "cosine"."""
    saliency_weight: NotNegative = 0.0
    """Of the saliency-supervised loss of EPS on O; above 0 O gets a background channel, its maps
    are a softmax over L + 1 channels, and every source needs `saliency`."""
    saliency_overlap: Share = 0.4
    """EPS: a class whose map overlaps less with the saliency is on the background's side."""
    saliency_foreground: Share = 0.5
    """EPS: the share of the foreground in the estimated saliency (VOC 0.5, COCO 0.9)."""
    head: CamHead = "linear"
    """Layers of F_CAM for P."""
    final_head: CamHead = "linear"
    """Layers of F_CAM for O."""
    head_width: PositiveInt = 512
    """Channels of the heads' 3 x 3 convolutions."""
    reduce_to: PositiveInt | None = None
    """A 1 x 1 convolution to so many channels before memory and aggregation (for D = 4096)."""
    projector: bool = False
    """The code's two 3 x 3 convolutions on the query side of the contrast alone."""
    region_mask: RegionMask = "mean"
    """M: where P, or its softmax over the classes (the code), exceeds its own mean."""
    momentum: Share = 0.99
    """gamma of Eq. 3: the weight of what is remembered."""
    gate: float = 0.7
    """nu: a region with a lower score does not change the memory."""
    gate_by: Literal["output", "intermediate"] = "output"
    """The score: sigmoid of the final map's mean (the code), or the bare mean of P (the paper)."""
    temperature: Positive = 0.07
    """tau of Eq. 4."""
    contrast_reduction: Literal["mean", "sum"] = "mean"
    """Over the images of a slot."""
    warmup_epochs: NotNegativeInt = 1
    """Epochs without contrast."""
    mixup: bool = True
    """Contrast mixtures of two regions (Eq. 5, 6)."""
    mixup_beta: Positive = 8.0
    """omega ~ Beta(beta, beta)."""
    mixup_pair: MixupPair = "other_class"
    """The partner is of another image and class, or any region of the batch (the code)."""
    mixup_scope: Literal["batch", "slot"] = "batch"
    """Where the partner is drawn from. "slot" saves the preview that several slots need."""
    keying: Keying = "image"
    """A row per (class, image), or rings of rows as in the code."""
    capacity: PositiveInt | None = None
    """Rows per class: None for a row per image (keying "ring": 500)."""
    noise: bool = False
    """Rows and prototypes start as N(0, 1) and count as set."""
    memory_table: TableKind = "sharded"
    """Spread the memory over the workers, or keep the whole of it on each."""
    num_prototypes: PositiveInt | None = 10
    """K; None: every row is a prototype."""
    prototype_steps: PositiveInt | None = None
    """Steps between two clusterings; None: one epoch."""
    kmeans_starts: PositiveInt = 1
    """Random starts of each clustering; the best one counts."""
    map_size: NotNegativeInt = 46
    """Side of the accumulated activation maps; 0: none are kept."""
    map_gate: Share = 0.1
    """A map is accumulated if sigmoid(GAP(O)) of its class is at least this."""

    def __post_init__(self) -> None:
        check_numbers(self, "method.")
        is_share = self.gate_by != "output" or 0 <= self.gate <= 1
        wanted = "from 0 to 1, as method.gate_by 'output' is"
        require(is_share, "method.gate", self.gate, wanted)
        if self.noise and self.keying != "ring":
            raise ValueError(
                "method.noise with method.keying 'image': a row that no image wrote would be read; "
                "use --method.keying ring, as the released code"
            )

    def build(self, setup: Setup) -> Method:
        from memseg_dist.methods.rca.memory import TrainingSet
        from memseg_dist.methods.rca.method import RCA

        backbone = setup.build_backbone()
        training = None
        if setup.for_training:
            regions = setup.labelled_regions
            training = TrainingSet(regions, setup.epoch_steps, setup.num_steps)
        return RCA(
            backbone,
            self,
            classes=setup.classes,
            num_classes=setup.num_classes,
            training=training,
            seed=setup.seed,
            device=setup.device,
        )

    def check(self, setup: Setup) -> None:
        for source in setup.sources:
            if source.supervision != "labels":
                raise ValueError(
                    f"source {source.name!r} has supervision {source.supervision!r}; RCA learns "
                    "from image labels alone: use 'labels'"
                )
            if source.swap_on_flip or (source.augment.rotate and self.map_size):
                raise ValueError(
                    f"source {source.name!r} has augment.rotate {source.augment.rotate} and "
                    f"swap_on_flip {source.swap_on_flip}; RCA's memories hold (class, image) pairs "
                    "of the index and its maps lie on the straight image: use neither (rotate is "
                    "fine with method.map_size 0)"
                )
            if self.saliency_weight > 0 and source.saliency is None:
                raise ValueError(
                    f"source {source.name!r} has no saliency maps, which method.saliency_weight "
                    "needs: set its `saliency` folder"
                )
        self._check_scored(setup)
        if len(setup.labelled_regions) == 0:
            raise ValueError(
                f"no image of the sources {[*setup.classes]} has a label that takes part: RCA has "
                "nothing to learn from; check `exclude` and the recipe that wrote the shards"
            )
        if self.map_size and setup.num_steps <= setup.epoch_steps:
            raise ValueError(
                f"steps is {setup.num_steps}, but an epoch takes {setup.epoch_steps}: maps are "
                "accumulated after the first, so none would be; train longer, or set "
                "method.map_size 0"
            )

        warmup = self.warmup_epochs * setup.epoch_steps
        if self.contrast_weight > 0 and setup.num_steps <= warmup:
            raise ValueError(
                f"steps is {setup.num_steps}, but method.warmup_epochs {self.warmup_epochs} are "
                f"{warmup} steps, so the contrast would never be on; train longer, or set "
                "method.contrast_weight 0"
            )

    def _check_scored(self, setup: Setup) -> None:
        """ValueError for a validation class that no source labels: it would have no map."""
        if setup.scored is None:
            return
        uids = np.array(setup.label_space.vocabulary.uids, dtype=object)
        missing = uids[np.setdiff1d(setup.scored, np.concatenate([*setup.classes.values()]))]
        if len(missing):
            raise ValueError(
                f"the validation set has the classes {sorted(missing)[:8]}, which no source "
                "labels: they have no activation map. Add them to validation.exclude"
            )


RING_CAPACITY = 500
"""Rows per class of the code's rings."""


def released(config: RCAConfig | None = None) -> RCAConfig:
    """`config` with every choice that `method` lists as the public code has it.

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
