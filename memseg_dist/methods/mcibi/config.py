"""The settings of MCIBI, what it can be trained with, and the presets of the paper and its code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from memseg_dist.checks import NotNegative, PositiveInt, Share, check_numbers, require
from memseg_dist.methods.mcibi.statistics import Weighting
from memseg_dist.methods.method import Method, MethodConfig
from memseg_dist.methods.pairs import check_masks_only
from memseg_dist.nn.context import ContextKind
from memseg_dist.nn.pixel_loss import Denominator

if TYPE_CHECKING:
    from memseg_dist.methods.setup import Setup

Codes = Literal["features", "zero", "random", "learnable", "image", "off"]


@dataclass(frozen=True)
class MCIBIConfig(MethodConfig):
    """Settings of the method; the defaults are the decisions that `method` lists."""

    kind: Literal["mcibi"] = "mcibi"
    memory: Codes = "features"
    """What each pixel gathers: the memory of the paper; or, on the same graph, zeros, fixed random
    codes, learned codes, or the image's own pixels (non-local attention); or "off": the plain
    segmenter."""
    context: ContextKind = "none"
    """Context within the image: none (FCN), ppm (PSPNet), aspp (DeepLabV3), ocr (OCRNet), uper
    (UPerNet)."""
    stages: tuple[int, ...] = (-4, -3, -2, -1)
    """Stages of the backbone whose maps are asked for, ascending; a ViT-L/16: 9 14 19 23."""
    pixels: Literal["last", "all"] = "last"
    """What the heads read: the map of the last of the stages, or all of them at the size of the
    first (HRNetV2)."""
    downsample: bool = False
    """One more convolution of stride 2 on the joined map of `pixels` all, for HRNet on
    Cityscapes and LIP."""
    dim: PositiveInt = 512
    """C, channels of pixel representations, memory and heads."""
    dropout: Share = 0.1
    """Share of the channels dropped before a head's last convolution."""
    transform_layers: PositiveInt = 2
    """1 x 1 convolutions in g_q and g_k."""
    fusion: Literal["concat", "add", "weighted_add"] = "concat"
    """F of Eq. 4 for R and C_bi (Table 1)."""
    context_fusion: Literal["attention", "concat"] = "attention"
    """C_wi is read by a second attention, or joined as it is."""
    bins: tuple[int, ...] = (1, 2, 3, 6)
    """Sides of the pooled maps of ppm and uper."""
    rates: tuple[int, ...] = (12, 24, 36)
    """Dilations of aspp; 6 12 18 for maps of stride 16."""
    distribution_weight: NotNegative = 0.4
    """alpha of Eq. 19, of W's loss."""
    consistency_weight: NotNegative = 1.0
    """beta of Eq. 19, of representation consistent learning; 0: off. Of a memory of features only:
    the controls have none."""
    consistency_epochs: NotNegative = 2.0
    """Epochs before it begins."""
    consistency_norm: Literal["running", "batch"] = "running"
    """How H2's BatchNorm sees the memory's vectors: by its running statistics, or (the code) as a
    batch, which moves the running statistics as well."""
    aux_heads: tuple[int, ...] = (-2,)
    """Auxiliary heads, by the places in `stages` of the maps they read; OCR's regions are the last
    one's."""
    aux_weight: NotNegative = 0.4
    """Of each auxiliary head's loss."""
    momentum: Share = 0.9
    """m_0: the share of the new value (not of the old one)."""
    momentum_schedule: Literal["poly", "constant"] = "poly"
    """poly: the momentum falls over the steps, Eq. 7; constant: it stays m_0."""
    momentum_power: NotNegative = 0.9
    """p of Eq. 7."""
    momentum_floor: Share = 0.01
    """The end of Eq. 7, as a share of m_0."""
    weighting: Weighting = "cosine"
    """Pixels weigh by their distance from the memory (Eq. 9, 10), or all the same."""
    first_vector: Literal["mean", "pixel", "cluster"] = "mean"
    """A class's first vector: the mean of its pixels in the step it first occurs in, random ones of
    them, or the centre of a cluster of random ones of the first steps."""
    first_steps: PositiveInt = 20
    """Steps whose pixels are clustered; until then the memory is empty."""
    detach_weights: bool = False
    """Keep the final loss from training H1 through W."""
    seg_denominator: Denominator = "valid"
    """Divide the pixels' losses by the labelled pixels, or by all."""

    def __post_init__(self) -> None:
        check_numbers(self, "method.")
        require(bool(self.stages), "method.stages", self.stages, "one stage or more")
        for name, values in (("bins", self.bins), ("rates", self.rates)):
            wanted = "one number or more, from 1 up"
            require(bool(values) and min(values) > 0, f"method.{name}", values, wanted)
        count = len(self.stages)
        wanted = f"places in method.stages, -{count} .. {count - 1}, each once"
        places = {index % count for index in self.aux_heads}
        fits = all(-count <= index < count for index in self.aux_heads)
        require(
            fits and len(places) == len(self.aux_heads), "method.aux_heads", self.aux_heads, wanted
        )
        if self.downsample and self.pixels != "all":
            raise ValueError(
                "method.downsample halves the joined map of method.pixels 'all', and that is "
                f"{self.pixels!r}; give the backbone a larger output_stride instead"
            )
        if self.context == "ocr" and not self.aux_heads:
            raise ValueError(
                "method.context 'ocr' reads its object regions from an auxiliary head, and "
                "method.aux_heads is empty; give one, as --method.aux-heads -2"
            )

    def build(self, setup: Setup) -> Method:
        from memseg_dist.methods.mcibi.method import MCIBI

        return MCIBI(
            setup.build_backbone(self.stages),
            self,
            classes=setup.classes,
            num_classes=setup.num_classes,
            epoch_steps=setup.epoch_steps if setup.for_training else None,
            device=setup.device,
        )

    def check(self, setup: Setup) -> None:
        check_masks_only(setup.sources, "MCIBI")
        for source in setup.sources:
            if source.batch_per_slot < 2 and self.context in ("ppm", "aspp", "uper"):
                raise ValueError(
                    f"source {source.name!r} has batch_per_slot {source.batch_per_slot}: the "
                    f"pooled branch of context {self.context!r} has one position per image, and "
                    "BatchNorm needs two values; use 2 or more"
                )
        setup.check_masks_show_all_classes()
        has_consistency = self.memory == "features" and self.consistency_weight > 0
        if has_consistency and setup.num_steps <= self.consistency_from(setup.epoch_steps):
            raise ValueError(
                f"steps is {setup.num_steps}, but method.consistency_epochs "
                f"{self.consistency_epochs} are {self.consistency_from(setup.epoch_steps)} steps, "
                "so consistent learning would never begin; train longer, begin earlier, or set "
                "method.consistency_weight 0"
            )

    def consistency_from(self, epoch_steps: int) -> int:
        """The step with which representation consistent learning begins."""
        return round(self.consistency_epochs * epoch_steps)

    def smoke(self) -> MCIBIConfig:
        """Small heads on the last stages that any net has, and every loss within four steps."""
        count = min(len(self.stages), 2)
        return replace(
            self,
            dim=min(self.dim, 32),
            stages=tuple(range(-count, 0)),
            aux_heads=(0,) if self.aux_heads else (),
            consistency_epochs=0.0,
            first_steps=2,
        )


def paper(config: MCIBIConfig | None = None) -> MCIBIConfig:
    """`config` with every choice that has a flag as the paper's text has it. C stays 512: the paper
    says the backbone's width, but the sizes in its Table 3 are those of 512. OCRNet keeps the
    auxiliary head that its regions come from.
    """
    config = config or MCIBIConfig()
    return replace(
        config,
        transform_layers=1,
        context_fusion="concat",
        consistency_epochs=0.0,
        aux_heads=config.aux_heads[-1:] if config.context == "ocr" else (),
        first_vector="pixel",
        seg_denominator="all",
    )


def released(config: MCIBIConfig | None = None) -> MCIBIConfig:
    """`config` as the public code trains ADE20K and COCO-Stuff 164k. Its other data sets have
    consistency_weight 0, and Cityscapes and COCO-Stuff 10k momentum 1.
    """
    return replace(config or MCIBIConfig(), consistency_norm="batch")
