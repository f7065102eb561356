r"""MCIBI on Cityscapes; paper, Tables 5 and 8.

    python datasets/cityscapes.py --root cityscapes --out shards/cityscapes
    python jobs/mcibi_cityscapes.py                             # DeepLabV3, ResNet-50
    python datasets/cityscapes.py --root cityscapes --out shards/cityscapes --splits trainval test
    python jobs/mcibi_cityscapes.py --net hrnet_w48 --trainval --multiscale

Not run here. Expected, from the paper (mIoU on val; without and with MCIBI, ResNet-50, one scale):

    FCN 75.16 / 78.50    PSPNet 79.05 / 79.90    OCRNet 79.40 / 79.98    DeepLabV3 80.57 / 81.14

and on the test server, DeepLabV3 with MCIBI trained on trainval: ResNet-50 79.90, ResNet-101 82.03,
ResNeSt-101 81.59, HRNet 82.55. After --trainval the score on val says nothing, since val was
learned; predictions for the server are `memseg predict`'s label maps, whose class numbers 0..18
its label ids must still replace.

One scale: the whole picture, 1024 x 2048. --multiscale: windows of 512 x 1024, as the crops are,
two thirds of a window apart; the public code slides windows of 1024 x 512.

Cost: 81,812 steps of 8 crops are 3.2e18 operations with ResNet-50 (computed, not run): 18 GPU
hours at 50 TFLOP/s; with --trainval ResNet-101 50, HRNet 34. Batches of 8 are 2 slots of 4, those
of --trainval 4 slots, for as many large GPUs or fewer; other hardware: jobs/mcibi_paper.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mcibi_paper import PaperOptions, Schedule, mcibi_run, with_views

from memseg_dist.config import ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary


@dataclass(frozen=True)
class Options(PaperOptions):
    """MCIBI on Cityscapes."""

    data: str = "shards/cityscapes"
    """Folder or URL that datasets/cityscapes.py wrote to."""
    trainval: bool = False
    """Train on train and val, for the test server, with the longer schedule of the public code."""


def stages(options: Options) -> dict[str, Stage]:
    schedule = Schedule(epochs=220, lr=0.01, weight_decay=5e-4, batch=8)
    if options.trainval:
        epochs = 500 if options.net in ("resnest101", "hrnet_w48") else 440
        schedule = replace(schedule, epochs=epochs, batch=16)
    split, num_images = ("trainval", 3_475) if options.trainval else ("train", 2_975)
    augment = AugmentConfig(crop=(512, 1024), resize=(2048, 1024))
    validation = ValidationConfig(
        f"{options.data}/val",
        mode="slide" if options.multiscale else "whole",
        resize=(2048, 1024),
        window=(512, 1024),
        stride=(341, 683),
    )
    run = mcibi_run(
        f"cityscapes_{split}",
        options,
        schedule,
        Source("cityscapes", f"{options.data}/{split}", "masks", batch_per_slot=4, augment=augment),
        with_views(validation, options),
        num_images=num_images,
        released_changes={"consistency_weight": 0.0, "momentum": 1.0},
        downsample=options.net == "hrnet_w48",
    )
    return {"train": run}


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("cityscapes", "validation"), vocabulary("cityscapes_19"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
