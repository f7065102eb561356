r"""Three-stage self-training on PASCAL VOC 2012: a part of the masks of 10,582 images.

    python datasets/voc2012.py --root VOCdevkit/VOC2012 --out shards/voc2012 --sbd SBD/dataset
    memseg data split shards/voc2012/train_aug --protocol voc-aug
    python jobs/three_stage_voc.py --split 1_50-seed0
    python jobs/three_stage_voc.py --split 1_50-seed0 --recipe supervised   # or self-training

Not run here. Expected from the paper (mIoU on val, DeepLabV2 on ResNet-101) at 1/100, 1/50, 1/20
and 1/8: from ImageNet 55.13 / 62.71 / 68.23 / 69.36; from a COCO model 63.82 / 70.77 / 71.90 /
72.95, which every stage takes as --stage1.backbone.pretrained and so on, in timm's names: there is
no converter for the model that the paper took. Its splits are lists of
others; with one, `memseg data split --keys FILE`. Cost: 10,000 steps of 10 crops of 321 pixels,
then twice 60,000. lambda is 1/4, as in the code; the paper has 5/4 at 1/20 and 5/8 at 1/8:
--stage2.method.consistency-weight and so on. Deviations: methods/three_stage/method.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from three_stage_recipes import ThreeStageOptions, three_stages

from memseg_dist.config import OptimizerConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary

RESNET101 = BackboneConfig(
    "resnet101.tv_in1k", "hub", output_stride=8, drop_path=0.0, frozen_batchnorm=True
)
ADAM = OptimizerConfig("adamw", lr=3e-5, weight_decay=0.0, schedule="step", backbone_lr_scale=0.1)
"""Without decay it is Adam; its rate is constant, that of pretrained layers a tenth."""
AUGMENT = AugmentConfig((500, 500), (0.5, 1.5), 321, photometric=False, category_max_ratio=1.0)


@dataclass(frozen=True)
class Options(ThreeStageOptions):
    """Three-stage self-training on PASCAL VOC 2012."""

    data: str = "shards/voc2012"
    """Folder that datasets/voc2012.py wrote."""


def stages(options: Options) -> dict[str, Stage]:
    train = f"{options.data}/train_aug"
    labelled = Source("voc", train, "masks", 1, 1, AUGMENT, split=options.split)
    everything = Source("voc_all", train, "none", 3, 3, AUGMENT)
    run = options.run(
        options.name_of("three_stage", "voc"),
        sources=(labelled, everything),
        method=ThreeStageConfig(consistency_weight=0.25, pseudo_weight=0.25),
        backbone=RESNET101,
        validation=ValidationConfig(f"{options.data}/val", mode="whole", resize=(500, 500)),
        steps=60_000,
        optimizer=ADAM,
    )
    first = replace(labelled, slots=2, batch_per_slot=5)
    return three_stages(options, run, first=first, first_steps=10_000, truth=train)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("voc", "voc_all", "validation"), vocabulary("voc_21"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
