r"""MCIBI on ADE20K, 150 classes; paper, Tables 5 and 6.

    python datasets/ade20k.py --root ADEChallengeData2016 --out shards/ade20k_150
    python jobs/mcibi_ade.py                                    # DeepLabV3, ResNet-50
    python jobs/mcibi_ade.py --net vit_large --multiscale
    python jobs/mcibi_ade.py --context none --baseline          # FCN

Not run here. Expected, from the paper (mIoU on val; without and with MCIBI, ResNet-50, one scale):

    FCN 36.96 / 42.84    PSPNet 42.64 / 43.77    OCRNet 42.47 / 43.34    DeepLabV3 43.19 / 44.34

and with --multiscale, DeepLabV3 with MCIBI: ResNet-50 45.95, ResNet-101 47.22, ResNeSt-101 47.36,
ViT-Large 50.80. HRNet has a schedule of the public code alone.

Cost: 164,206 steps of 16 crops are 6.2e18 operations with ResNet-50 (computed, not run): 34 GPU
hours at 50 TFLOP/s; ViT-Large 37, ResNet-101 41, ResNeSt-101 58, HRNet 117. Batches of 16 are 2
slots of 8, for one or two large GPUs; other hardware: jobs/mcibi_paper.py. Deviations from paper
and code are listed in methods/mcibi/method.py; `--preset` sets theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcibi_paper import PaperOptions, Schedule, mcibi_run, scene_validation

from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary


@dataclass(frozen=True)
class Options(PaperOptions):
    """MCIBI on ADE20K."""

    data: str = "shards/ade20k_150"
    """Folder or URL that datasets/ade20k.py wrote to."""


def stages(options: Options) -> dict[str, Stage]:
    schedule = Schedule(epochs=130, lr=0.01, weight_decay=5e-4, batch=16)
    if options.net in ("resnest101", "hrnet_w48"):
        schedule = Schedule(epochs=180, lr=0.004, weight_decay=5e-4, batch=16)
    augment = AugmentConfig(crop=512, resize=(2048, 512))
    run = mcibi_run(
        "ade",
        options,
        schedule,
        Source("ade", f"{options.data}/train", "masks", batch_per_slot=8, augment=augment),
        scene_validation(f"{options.data}/val", options, slide=False),
        num_images=20_210,
    )
    return {"train": run}


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("ade", "validation"), vocabulary("ade20k_150"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
