"""What the jobs of RCA share: from image labels to a segmenter, in three stages.

classifier   trains activation maps and accumulates them          STORAGE/NAME
labels       maps -> pseudo labels, written as shards             STORAGE/NAME/labels
segmenter    an ordinary run on those shards                      STORAGE/NAME_segmenter
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from memseg_dist.config import (
    Intervals,
    LaunchConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import BACKGROUND
from memseg_dist.methods.rca.config import RCAConfig, released
from memseg_dist.methods.rca.fusion import RULES, FusionConfig
from memseg_dist.methods.rca.labeller import ActivationLabeller
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import PipelineOptions
from memseg_dist.stages import LabelConfig, Stage, result

AUGMENT = AugmentConfig(
    resize=(368, 368),
    scale_range=(1.0, 1.0),
    crop=368,
    keep_ratio=False,
    category_max_ratio=1.0,
)
VGG16 = BackboneConfig("vgg16.tv_in1k", "hub", output_stride=8, drop_path=0.0)
SEGMENTER_OPTIMIZER = OptimizerConfig(
    lr=2.5e-3, weight_decay=5e-4, min_lr=0.0, backbone_lr_scale=0.1
)
"""DeepLabV2's: 2.5e-4, ten times that for the head."""


@dataclass(frozen=True)
class RCAOptions(PipelineOptions):
    """RCA from image labels to a segmenter."""

    preset: Literal["decided", "paper", "released"] = "decided"
    """Where the paper is silent or its public code differs: as methods/rca decides, with the bare
    products of the paper's attention, or as the code has it."""
    baseline: bool = False
    """The classifier without memory: the same maps, fusion and segmenter."""
    saliency: str | None = None
    """Folder of saliency maps KEY.png (8 bit, of the images' sizes) for the pseudo labels."""
    eps: bool = False
    """Train with the saliency-supervised loss of EPS as well, and label by its rules (--rules eps);
    needs --saliency."""
    rules: Literal["rca", "oaa", "eps"] | None = None
    """Whose rules fuse the maps to labels: `RULES` of methods/rca/fusion.py; by default the job's.
    Those of EPS take predicted maps, and no saliency."""
    truth: str | None = None
    """Shards with masks of the training images, to score the pseudo labels; by default those of
    the recipe, where it writes some."""
    launch: LaunchConfig = LaunchConfig(workers=(1, 4))

    def name_of(self, data: str) -> str:
        """Of the classifier's run on `data`."""
        return self.name or f"{'oaa' if self.baseline else 'rca'}_{data}"


def rca_stages(
    options: RCAOptions,
    classifier: RunConfig,
    segmenter: RunConfig,
    *,
    fusion: FusionConfig = FusionConfig(),
    truth: str | None = None,
) -> dict[str, Stage]:
    """classifier: a run of the paper's method, which the options change; the images of its first
    source are labelled. segmenter: its only source is `result("labels")`. truth: shards with masks.
    """
    method, sources = classifier.method, classifier.sources
    assert isinstance(method, RCAConfig)
    if options.preset == "paper":
        method = replace(method, attention_scale="raw")
    if options.preset == "released":
        method = released(method)
    if options.baseline:
        method = replace(method, contrast_weight=0.0, aggregation="off", noise=False)
    if options.eps:
        if options.saliency is None:
            raise ValueError("--eps needs --saliency: the folder of the images' saliency maps")
        method = replace(method, saliency_weight=1.0)
        sources = tuple(replace(source, saliency=options.saliency) for source in sources)
    labeller = ActivationLabeller(saliency=options.saliency, fusion=fusion)
    rules = options.rules or ("eps" if options.eps else None)
    if rules == "eps":
        labeller = ActivationLabeller(maps="predicted", fusion=RULES[rules])
    elif rules is not None:
        labeller = replace(labeller, fusion=RULES[rules])
    labels = LabelConfig(
        checkpoint=result("classifier"),
        data=sources[0].path,
        out=result("classifier") + "/labels",
        labeller=labeller,
        truth=options.truth or truth,
        workers=0 if options.launch.launcher == "local" else None,
    )
    return {
        "classifier": replace(classifier, method=method, sources=sources),
        "labels": labels,
        "segmenter": replace(segmenter, name=f"{classifier.name}_segmenter"),
    }


def published(
    options: RCAOptions,
    source: Source,
    val: str,
    num_images: int,
    *,
    name: str,
    method: RCAConfig,
    backbone: BackboneConfig,
    segmenter_steps: int,
    max_images: int | None = None,
    truth: str | None = None,
) -> dict[str, Stage]:
    """The paper's runs: 30 epochs of `source` for the classifier, then DeepLabV2 on ResNet-101.

    val: shards to score on, of which the classifier takes the first `max_images`.
    """
    epoch = -(-num_images // (source.slots * source.batch_per_slot))
    classifier = options.run(
        options.name_of(name),
        sources=(source,),
        method=method,
        backbone=backbone,
        validation=ValidationConfig(
            val, mode="whole", resize=(368, 368), exclude=(BACKGROUND,), max_images=max_images
        ),
        steps=30 * epoch,
        # the released code's; the paper's rate of a tenth every five epochs would end at 1e-8
        optimizer=OptimizerConfig(
            lr=1e-2,
            nesterov=True,
            weight_decay=5e-4,
            decay_norms_and_biases=True,
            schedule="step",
            milestones=(5 * epoch, 10 * epoch),
            backbone_lr_scale=0.1,
            bias_lr_scale=2.0,
        ),
        every=Intervals(evaluate=5 * epoch, checkpoint=min(epoch, 2000)),
    )
    augment = AugmentConfig(
        resize=(500, 500), crop=321, scale_range=(0.5, 1.5), category_max_ratio=1.0
    )
    segmenter = replace(
        classifier,
        sources=(Source("pseudo", result("labels"), "masks", 5, 2, augment),),
        method=SegmentConfig(),
        backbone=BackboneConfig("resnet101.tv_in1k", "hub", output_stride=8, drop_path=0.0),
        validation=ValidationConfig(val, mode="whole", resize=(513, 513)),
        optimizer=SEGMENTER_OPTIMIZER,
        steps=segmenter_steps,
        every=Intervals(evaluate=segmenter_steps // 4),
    )
    return rca_stages(options, classifier, segmenter, truth=truth)
