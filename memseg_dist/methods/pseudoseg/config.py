"""The settings of PseudoSeg, what it can be trained with, and the preset of its public code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from memseg_dist.checks import NotNegative, Positive, PositiveInt, Share, check_numbers, require
from memseg_dist.methods.method import Method, MethodConfig
from memseg_dist.methods.pseudoseg.augment import Brightness
from memseg_dist.methods.pseudoseg.fusion import NormScope

if TYPE_CHECKING:
    from memseg_dist.methods.setup import Setup

PseudoLabel = Literal["fused", "decoder", "activation", "none"]


@dataclass(frozen=True)
class PseudoSegConfig(MethodConfig):
    """Settings of the method; the defaults are the decisions that `method` lists."""

    kind: Literal["pseudoseg"] = "pseudoseg"
    pseudo_label: PseudoLabel = "fused"
    """What teaches the strong view: both sources (Eq. 4), the decoder alone, the self-attention
    Grad-CAM alone; or none: plain supervised DeepLabV3+."""
    background: str | None = None
    """Uid of the class that no image label names and no activation map shows, as VOC's
    "background"; None: every class is an object or a kind of stuff with a map of its own."""
    stages: tuple[int, int, int] = (-4, -2, -1)
    """Stages of the backbone: the decoder's finer map (stride 4), the last but one (for the
    hypercolumn) and the last."""
    rates: tuple[int, ...] = (6, 12, 18)
    """Dilations of the pyramid on the last map."""
    dim: PositiveInt = 256
    """Channels of the pyramid and the decoder."""
    attention_dim: PositiveInt = 128
    """Channels of keys and queries."""
    dropout: Share = 0.1
    """Of the pyramid's output."""
    classifier_dropout: Share = 0.0
    """Of the pooled features that the classifier reads; the code: 0.5 with Xception, else 0."""
    gamma: Share = 0.5
    """Weight of the decoder in the fusion; the paper: 0.3 where there are many masks."""
    temperature: Positive = 0.5
    """T of the sharpening; 1: off. The paper: 0.7 where there are many masks."""
    norm_scope: NormScope = "batch"
    """What the root mean square of Eq. 4 is taken over: the slot, each image, or each source."""
    centred: bool = True
    """Take r without the logits' mean over the classes, which no softmax sees; the code: with it.
    SGD leaves it near 0, Adam lets it grow until r flattens the pseudo labels."""
    hard: bool = False
    """One-hot pseudo labels instead of soft ones."""
    threshold: Share = 0.0
    """Only positions whose pseudo label is at least so probable teach; 0: all."""
    unlabelled_weight: NotNegative = 1.0
    """Of L_u."""
    warmup: Share = 0.05
    """Share of the run over which the weight of L_u rises from 0."""
    classification_weight: NotNegative = 1.0
    """Of L_x."""
    activation_weight: NotNegative = 1.0
    """Of L_sa."""
    shown_from: Share = 0.5
    """The classifier's probability from which an unlabelled image is taken to show a class."""
    jitter: Share = 0.5
    """Strength of the colour jitter of the strong view; hue: half of it."""
    jitter_brightness: Brightness = "additive"
    """Whether the jitter shifts the brightness or scales it."""
    cutout: Share = 0.19
    """Side of the cut-out box, a share of the crop's; 0: none."""
    strong_statistics: bool = False
    """Let the strong view move BatchNorm's running statistics as well, as the code does."""
    sgc_affine: bool = False
    """Let BatchNorm of the self-attention Grad-CAM learn a scale: its logits then have no fixed
    magnitude."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "rates", tuple(self.rates))
        check_numbers(self, "method.")
        require(len(self.stages) == 3, "method.stages", self.stages, "three stages, ascending")
        wanted = "one or more dilations, from 1 up"
        require(self.rates and min(self.rates) > 0, "method.rates", self.rates, wanted)

    def build(self, setup: Setup) -> Method:
        from memseg_dist.methods.pseudoseg.method import PseudoSeg

        return PseudoSeg(
            setup.build_backbone(self.stages),
            self,
            sources={source.name: source for source in setup.sources},
            classes=setup.classes,
            num_classes=setup.num_classes,
            background=self._background(setup),
            device=setup.device,
        )

    def _background(self, setup: Setup) -> int | None:
        """Its label-space id. ValueError for a uid that no source has masks of."""
        if self.background is None:
            return None
        vocabulary = setup.label_space.vocabulary
        known = [vocabulary.uids[class_id] for class_id in setup.trained]
        if self.background not in known:
            raise ValueError(
                f"method.background {self.background!r} is no class that a source has masks of: "
                f"{known[:8]}; give one of them, or none if the masks have no background"
            )
        return vocabulary.index(self.background)

    def check(self, setup: Setup) -> None:
        others = [source for source in setup.sources if source.supervision != "masks"]
        if not setup.labelled_sources:
            raise ValueError(
                f"no labelled image: none of the sources {[*setup.classes]} has supervision "
                "'masks'; PseudoSeg needs some, make a split with `memseg data split`"
            )
        if others and self.pseudo_label == "none":
            raise ValueError(
                f"source {others[0].name!r} has no masks, and method.pseudo_label is 'none': "
                "nothing would learn from it; leave it out, or choose another pseudo label"
            )
        if not others and self.pseudo_label != "none":
            raise ValueError(
                f"method.pseudo_label is {self.pseudo_label!r}, but every source has supervision "
                "'masks'; add a source with 'none' or 'labels', or use --method.pseudo-label none"
            )
        for source in setup.sources:
            if source.batch_per_slot < 2:
                raise ValueError(
                    f"source {source.name!r} has batch_per_slot {source.batch_per_slot}: the "
                    "pooled branch of DeepLabV3+ has one position per image, and BatchNorm needs "
                    "two values; use 2 or more"
                )
        setup.check_masks_show_all_classes()
        self._check_image_labels(setup)

    def _check_image_labels(self, setup: Setup) -> None:
        """ValueError for a source of image labels none of which is a class with masks."""
        uids = setup.label_space.vocabulary.uids
        for source in setup.sources:
            own = setup.classes[source.name]
            if source.supervision == "labels" and not np.isin(own, setup.trained).any():
                raise ValueError(
                    f"source {source.name!r}: none of its labels, such as "
                    f"{[uids[i] for i in own[:4]]}, is a class that another source has masks of, "
                    f"such as {[uids[i] for i in setup.trained[:4]]}; give its vocabulary the uids "
                    "of the masks, or use supervision 'none'"
                )

    def smoke(self) -> PseudoSegConfig:
        """Small heads on the last stages of any net, and L_u within four steps."""
        return replace(
            self,
            dim=min(self.dim, 32),
            attention_dim=min(self.attention_dim, 16),
            stages=(-3, -2, -1),
            warmup=0.0,
        )


def released(config: PseudoSegConfig | None = None) -> PseudoSegConfig:
    """`config` with every choice that has a flag as the public code has it. The labels of its
    images are those of the crop: `labels_from="crop"` of the source.
    """
    config = config or PseudoSegConfig()
    return replace(config, warmup=0.0, centred=False, strong_statistics=True)
