r"""Three-stage self-training on Cityscapes at half size: a part of the 2,975 masks.

    python datasets/cityscapes.py --root cityscapes --out shards/cityscapes
    memseg data split shards/cityscapes/train --protocol cityscapes
    python jobs/three_stage_cityscapes.py --split 1_30-seed0

Not run here. Expected from the paper (mIoU on val, DeepLabV2 on ResNet-101 from ImageNet): 54.85 /
62.82 / 65.80 / 67.11 with 100, 372, 744 and 1,488 masks; all masks 66.0. With 1,488 it takes three
labelled images a step: --stage2.sources.0.batch-per-slot 3 --stage2.sources.1.batch-per-slot 2, and
the same for stage3. Cost: 20,000 steps of 4 crops of 256 x 512, then twice 60,000 of 5. Pictures
are halved by area in the loader, as the paper's were beforehand; masks take the nearest pixel,
where its majority. Deviations from paper and code: methods/three_stage/method.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from three_stage_recipes import ThreeStageOptions, three_stages
from three_stage_voc import ADAM, RESNET101

from memseg_dist.config import ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary

HALF = (1024, 512)
AUGMENT = AugmentConfig(HALF, (1.0, 1.0), (256, 512), photometric=False, category_max_ratio=1.0)


@dataclass(frozen=True)
class Options(ThreeStageOptions):
    """Three-stage self-training on Cityscapes."""

    data: str = "shards/cityscapes"
    """Folder that datasets/cityscapes.py wrote."""


def stages(options: Options) -> dict[str, Stage]:
    train = f"{options.data}/train"
    labelled = Source("cityscapes", train, "masks", 1, 1, AUGMENT, split=options.split)
    everything = Source("cityscapes_all", train, "none", 2, 2, AUGMENT)
    run = options.run(
        options.name_of("three_stage", "cityscapes"),
        sources=(labelled, everything),
        method=ThreeStageConfig(),
        backbone=RESNET101,
        validation=ValidationConfig(f"{options.data}/val", mode="whole", resize=HALF),
        steps=60_000,
        optimizer=ADAM,
    )
    first = replace(labelled, slots=1, batch_per_slot=4)
    return three_stages(options, run, first=first, first_steps=20_000, truth=train)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    names = ("cityscapes", "cityscapes_all", "validation")
    return dict.fromkeys(names, vocabulary("cityscapes_19"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
