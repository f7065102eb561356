"""The settings of LarvSeg."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from memseg_dist.checks import NotNegative, Positive, PositiveInt, check_numbers, require
from memseg_dist.memory.layouts import TableKind
from memseg_dist.methods.larvseg.attention import BackgroundReduction
from memseg_dist.methods.method import Method, MethodConfig
from memseg_dist.nn.pixel_loss import Denominator

if TYPE_CHECKING:
    from memseg_dist.methods.setup import Setup


@dataclass(frozen=True)
class LarvSegConfig(MethodConfig):
    """Settings of the method; the defaults are the paper's main experiment."""

    labels_name_all: ClassVar[bool] = True  # the attention for a label falls on what has none

    kind: Literal["larvseg"] = "larvseg"
    attention: Literal["cross_image", "single_image", "off"] = "cross_image"
    """Where L_aux looks: by the memory, at the image's pixels of high score by the classifier
    (Table 5), or no L_aux."""
    cls_weight: NotNegative = 0.1
    """lambda_cls."""
    aux_weight: NotNegative = 0.1
    """lambda_aux."""
    source_weights: Mapping[str, float] = field(default_factory=dict)
    """Factor on one loss of a source, by SOURCE/LOSS as the figures name it ("weak_ade/aux"), or on
    all losses of a source, by its name; 1 where not given. A source whose "aux" is 0 does not feed
    the memory either (Table 4)."""
    capacity: PositiveInt = 20
    """M: events that the memory keeps per class."""
    top_k: PositiveInt = 20
    """K: pixels that make one event."""
    warm_up: PositiveInt | None = None
    """Events that a class needs before L_aux uses it; None: a full memory, M."""
    memory_scope: Literal["global", "slot"] = "global"
    """One memory for all slots, or one each as in the official code, whose GPUs never exchange."""
    memory_table: TableKind = "sharded"
    """Spread the memory over the workers, or keep the whole of it on each."""
    memory_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the stored rows; their means are fp32."""
    novel_only: bool = False
    """Keep no memory of classes that have masks."""
    background: BackgroundReduction = "mean"
    """How the scores of the background classes become S_bg."""
    peak_threshold: float = 0.35
    """Images with one label: a class is seen if the mean of its 5 highest cosines exceeds this."""
    distance_threshold: float = 2.0
    """... and is background if mse(zscore(S_fg), zscore(S_k)) exceeds this (0..4)."""
    skip_cold_background: bool = True
    """A class that is not warm is no background."""
    pool_by_attention: bool = False
    """Divide the attentive pooling by the sum of the attention, not by the number of positions."""
    temperature: Positive = 1.0
    """tau of Eq. 5."""
    logit_scale: Positive | None = None
    """A fixed scale of the plain cosine; None: normalised over the classes, learned scale."""
    seg_denominator: Denominator = "all"
    """Divide L_seg by all pixels, or by the labelled ones."""
    keep_duplicates: bool = False
    """Give a class that k names share k columns of the softmax, as in the official code."""
    mask_padding: bool = True
    """Padding takes no part in pooling, top-K and z-score."""

    def __post_init__(self) -> None:
        check_numbers(self, "method.")
        wanted = f"at most method.capacity ({self.capacity}): no class would ever have so many"
        is_reached = self.warm_up is None or self.warm_up <= self.capacity
        require(is_reached, "method.warm_up", self.warm_up, wanted)

    def build(self, setup: Setup) -> Method:
        from memseg_dist.methods.larvseg.classifier import CosineClassifier
        from memseg_dist.methods.larvseg.method import LarvSeg

        backbone = setup.build_backbone()
        with_masks = [source for source in setup.sources if source.supervision == "masks"]
        return LarvSeg(
            backbone,
            CosineClassifier(setup.num_classes, backbone.dim),
            self,
            classes=setup.classes,
            multiplicity={source.name: setup.multiplicity(source) for source in with_masks},
            base_classes=sorted({int(i) for s in with_masks for i in setup.classes[s.name]}),
            num_slots=setup.num_slots,
            with_memory=setup.for_training,
            device=setup.device,
        )

    def check(self, setup: Setup) -> None:
        names = [source.name for source in setup.sources]
        known = {*names, *(f"{name}/{loss}" for name in names for loss in ("seg", "cls", "aux"))}
        for key, weight in self.source_weights.items():
            wanted = f"a source of {names}, or SOURCE/seg, SOURCE/cls or SOURCE/aux"
            require(key in known, "a key of method.source_weights", key, wanted)
            require(weight >= 0, f"method.source_weights of {key}", weight, "0 or more")

    def smoke(self) -> LarvSegConfig:
        """A class is warm after its first event, so that four steps reach L_aux."""
        return replace(self, warm_up=1)
