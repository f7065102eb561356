r"""PseudoSeg on PASCAL VOC 2012: a part of the 1,464 masks, and all 10,582 images.

    python datasets/voc2012.py --root VOCdevkit/VOC2012 --out shards/voc2012 --sbd SBD/dataset
    memseg data split shards/voc2012/train --protocol voc
    python jobs/pseudoseg_voc.py --split 1_16-seed0
    python jobs/pseudoseg_voc.py --split 1_16-seed0 --image-labels crop     # as the public code
    python jobs/pseudoseg_voc.py --split 1_16-seed0 --recipe supervised     # or self-training

Not run here. Expected from the paper (mIoU on val, Xception-65; supervised / hard self-training /
PseudoSeg / PseudoSeg with image labels of the crop):

    1/4 70.20 / 72.85 / 73.79 / 75.29    1/8 64.00 / 69.88 / 73.13 / 74.70
    1/16 56.03 / 64.20 / 67.06 / 71.22, and over three splits 55.9-56.9 / - / 64.1-67.1 / 68.1-71.2

Its splits are lists of its own draws; with one, `memseg data split --keys FILE`. Cost: 30,000 steps
of 64 labelled and 64 other crops, in slots of 4 as its 16 GPUs had them; any number of workers up
to 32 shares them. Deviations from paper and code are listed in methods/pseudoseg/method.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pseudoseg_recipes import NETS, PseudoSegOptions, all_images, pseudoseg_stages

from memseg_dist.config import LaunchConfig, OptimizerConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.pseudoseg.config import PseudoSegConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary

AUGMENT = AugmentConfig((500, 500), (0.5, 2.0), 513, photometric=False, category_max_ratio=1.0)
"""The weak view: scale, crop, flip. VOC's longest side is 500 pixels."""


@dataclass(frozen=True)
class Options(PseudoSegOptions):
    """PseudoSeg on PASCAL VOC 2012."""

    data: str = "shards/voc2012"
    """Folder that datasets/voc2012.py wrote."""
    net: Literal["xception65", "resnet50", "resnet101"] = "xception65"
    """The backbone."""
    launch: LaunchConfig = LaunchConfig(workers=(1, 32))


def stages(options: Options) -> dict[str, Stage]:
    is_xception = options.net == "xception65"
    labelled = Source(
        "voc", f"{options.data}/train", "masks", 16, 4, AUGMENT, labels_from="crop",
        split=options.split,
    )  # fmt: skip
    everything = replace(labelled, name="voc_all", path=f"{options.data}/train_aug")
    run = options.run(
        options.name_of("pseudoseg", "voc"),
        sources=(labelled, all_images(options, everything)),
        method=PseudoSegConfig(
            background="background", classifier_dropout=0.5 if is_xception else 0.0
        ),
        backbone=NETS[options.net],
        validation=ValidationConfig(f"{options.data}/val", mode="whole", resize=(500, 500)),
        steps=30_000,
        optimizer=OptimizerConfig(
            lr=0.007, min_lr=0.0, weight_decay=4e-5 if is_xception else 1e-4, bias_lr_scale=2.0
        ),
    )
    return pseudoseg_stages(options, run, truth=everything.path)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("voc", "voc_all", "validation"), vocabulary("voc_21"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
