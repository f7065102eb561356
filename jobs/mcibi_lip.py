r"""MCIBI on LIP, single human parsing; paper, Tables 5 and 7, and its transfer to CIHP, Table 4.

    python datasets/lip.py --root LIP --out shards/lip
    python jobs/mcibi_lip.py --context none                     # FCN, ResNet-50
    python jobs/mcibi_lip.py --net hrnet_w48 --multiscale       # scored with mirror images

    python datasets/lip.py --dataset cihp --root instance-level_human_parsing --out shards/cihp
    memseg eval --checkpoint runs/mcibi_lip_resnet50_none --data shards/cihp/val

The last line is Table 4: CIHP is scored with the model, the size and the views of the run on LIP.

Not run here. Expected, from the paper (mIoU on val; without and with MCIBI, ResNet-50, one scale):

    LIP    FCN 48.63 / 51.07   PSPNet 51.94 / 52.84   OCRNet 52.25 / 52.80   DeepLabV3 52.35 / 53.52
    CIHP   FCN 27.20 / 27.57   DeepLabV3 27.02 / 27.89

and with --multiscale, DeepLabV3 with MCIBI: ResNet-50 54.08, ResNet-101 55.42, ResNeSt-101 56.34,
HRNet 56.99. The public code's ResNets have LeakyReLU heads here, ours ReLU.

Cost: 142,790 steps of 32 crops are 9.4e18 operations with ResNet-50 (computed, not run): 52 GPU
hours at 50 TFLOP/s; HRNet 36. Batches of 32 are 4 slots of 8, those of 40 (ResNeSt, HRNet) 5 slots,
for as many large GPUs or fewer; other hardware: jobs/mcibi_paper.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mcibi_paper import PaperOptions, Schedule, mcibi_run

from memseg_dist.config import ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import recipe, vocabulary


@dataclass(frozen=True)
class Options(PaperOptions):
    """MCIBI on LIP."""

    data: str = "shards/lip"
    """Folder or URL that datasets/lip.py wrote to."""
    multiscale: bool = False
    """Test as in the paper's Table 7: one scale and its mirror image, left and right exchanged; at
    the end of training only."""


def stages(options: Options) -> dict[str, Stage]:
    left_right = recipe("lip").LEFT_RIGHT
    schedule = Schedule(epochs=150, lr=0.01, weight_decay=5e-4, batch=32)
    if options.net in ("resnest101", "hrnet_w48"):
        schedule = replace(schedule, lr=0.007, batch=40)
    augment = AugmentConfig(
        resize=(520, 520),
        scale_range=(0.75, 1.25),
        crop=473,
        keep_ratio=False,
        rotate=30.0,
        rotate_chance=0.6,
    )
    run = mcibi_run(
        "lip",
        options,
        schedule,
        Source(
            "lip",
            f"{options.data}/train",
            "masks",
            batch_per_slot=8,
            augment=augment,
            swap_on_flip=left_right,
        ),
        ValidationConfig(
            f"{options.data}/val",
            mode="whole",
            resize=(473, 473),
            keep_ratio=False,
            flip=options.multiscale,
            swap=left_right,
        ),
        num_images=30_462,
        released_changes={"consistency_weight": 0.0},
        downsample=options.net == "hrnet_w48",
    )
    return {"train": run}


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("lip", "validation"), vocabulary("lip_20"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
