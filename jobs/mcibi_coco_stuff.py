r"""MCIBI on COCO-Stuff, the first 10,000 images or all 164,000; paper, Tables 5 and 9.

    python datasets/coco_stuff.py --root cocostuff-10k --release 10k --out shards/coco_stuff_10k
    python jobs/mcibi_coco_stuff.py --net resnet101 --multiscale
    python datasets/coco_stuff.py --root coco --out shards/coco_stuff
    python jobs/mcibi_coco_stuff.py --release 164k              # DeepLabV3, ResNet-50

Not run here. Expected, from the paper (mIoU). 164k, val; without and with MCIBI, ResNet-50, one
scale:

    FCN 35.11 / 39.95    PSPNet 41.01 / 41.80    OCRNet 40.57 / 41.10    DeepLabV3 41.86 / 42.08

10k, test list, with --multiscale, DeepLabV3 with MCIBI: ResNet-50 39.68, ResNet-101 41.49,
ResNeSt-101 42.15, ViT-Large 44.89. The public code's ViT-Large has the dilations --method.rates 12
24 36 here, wider than its map; its heads have 182 outputs, of which 171 are classes.

Cost with ResNet-50: 61,875 steps of 16 crops are 2.3e18 operations on the 10k, 221,788 are 8.4e18
on the 164k (computed, not run): 13 and 46 GPU hours at 50 TFLOP/s. Batches of 16 are 2 slots of 8,
those of 32 (ResNeSt, 10k) 4 slots, for as many large GPUs or fewer; other hardware:
jobs/mcibi_paper.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mcibi_paper import PaperOptions, Schedule, mcibi_run, scene_validation

from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary

FOLDERS = {"10k": "coco_stuff_10k", "164k": "coco_stuff"}
NUM_IMAGES = {"10k": 9_000, "164k": 118_287}


@dataclass(frozen=True)
class Options(PaperOptions):
    """MCIBI on COCO-Stuff."""

    data: str = "shards"
    """Folder or URL of the shards coco_stuff_10k and coco_stuff."""
    release: Literal["10k", "164k"] = "10k"
    """COCO-Stuff 10K, or the 118,287 training images of COCO-Stuff 164K."""


def stages(options: Options) -> dict[str, Stage]:
    schedule = Schedule(epochs=30, lr=0.01, weight_decay=5e-4, batch=16)
    if options.release == "10k":
        schedule = Schedule(epochs=110, lr=0.001, weight_decay=1e-4, batch=16)
        if options.net == "resnest101":
            schedule = replace(schedule, epochs=150, weight_decay=5e-4, batch=32)
    folder = FOLDERS[options.release]
    path = f"{options.data}/{folder}"
    augment = AugmentConfig(crop=512, resize=(2048, 512))
    is_small = options.release == "10k"
    run = mcibi_run(
        folder,
        options,
        schedule,
        Source("coco_stuff", f"{path}/train", "masks", batch_per_slot=8, augment=augment),
        scene_validation(f"{path}/val", options, slide=options.multiscale),
        num_images=NUM_IMAGES[options.release],
        released_changes={"consistency_weight": 0.0, "momentum": 1.0} if is_small else None,
    )
    return {"train": run}


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("coco_stuff", "validation"), vocabulary("coco_stuff_171"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
