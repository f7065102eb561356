r"""PseudoSeg on COCO 2017, 80 classes and background: a part of the 118,287 masks, and all images.

    python datasets/coco2014.py --year 2017 --root COCO --out shards/coco2017
    memseg data split shards/coco2017/train --protocol coco
    python jobs/pseudoseg_coco.py --split 1_64-seed0

Not run here; the paper has curves, no table: at each of 1/32 to 1/512 above the supervised network.
Cost: 200,000 steps of 64 labelled and 64 other crops; see jobs/pseudoseg_voc.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pseudoseg_recipes import NETS, PseudoSegOptions, all_images, pseudoseg_stages

from memseg_dist.config import LaunchConfig, OptimizerConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.pseudoseg.config import PseudoSegConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary

AUGMENT = AugmentConfig((640, 640), (0.5, 2.0), 513, photometric=False, category_max_ratio=1.0)
"""COCO's longest side is 640 pixels."""


@dataclass(frozen=True)
class Options(PseudoSegOptions):
    """PseudoSeg on COCO 2017."""

    data: str = "shards/coco2017"
    """Folder that datasets/coco2014.py --year 2017 wrote."""
    launch: LaunchConfig = LaunchConfig(workers=(1, 32))


def stages(options: Options) -> dict[str, Stage]:
    labelled = Source(
        "coco", f"{options.data}/train", "masks", 16, 4, AUGMENT, labels_from="crop",
        split=options.split,
    )  # fmt: skip
    everything = replace(labelled, name="coco_all")
    run = options.run(
        options.name_of("pseudoseg", "coco"),
        sources=(labelled, all_images(options, everything)),
        method=PseudoSegConfig(background="background", classifier_dropout=0.5),
        backbone=NETS["xception65"],
        validation=ValidationConfig(f"{options.data}/val", mode="whole", resize=(640, 640)),
        steps=200_000,
        optimizer=OptimizerConfig(lr=0.007, min_lr=0.0, weight_decay=4e-5, bias_lr_scale=2.0),
    )
    return pseudoseg_stages(options, run, truth=everything.path)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("coco", "coco_all", "validation"), vocabulary("coco_81"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
