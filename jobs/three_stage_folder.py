r"""Three-stage self-training on your own pictures: masks of a few, and all of them.

    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/train
    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/val
    memseg data split shards/train 1/16 --rule every-class
    python jobs/three_stage_folder.py --masks shards/train --split 1_16-seed0 --val shards/val

Pictures without masks are those of --images, by default all of --masks; the labelled ones must be
among them, because they get pseudo masks too. The backbone is a ResNet-50 of the hub whose
BatchNorm stays as it is; another net and a file of its weights for all stages:
--backbone and --weights. Cost and score depend on the data; docs/results.md has those of runs on
street scenes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from folder_setup import MaskOptions
from three_stage_recipes import ThreeStageOptions, three_stages
from three_stage_voc import ADAM

from memseg_dist.config import ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage


@dataclass(frozen=True)
class Options(MaskOptions, ThreeStageOptions):
    """Three-stage self-training on your own pictures."""

    images: str | None = None
    """Shards of all pictures, the labelled ones among them; by default those of --masks."""
    crop: int = 320
    backbone: str = "resnet50.a1_in1k"
    """A convolutional net of timm."""
    weights: str = "hub"
    """Its weights: the hub's, or a .safetensors file. BatchNorm is frozen, so it needs some."""


def stages(options: Options) -> dict[str, Stage]:
    crop, resize = options.crop, (4 * options.crop, options.crop)
    augment = AugmentConfig(crop=crop, resize=resize, photometric=False)
    labelled = Source("masks", options.masks, "masks", 1, 2, augment, split=options.split)
    images = options.images or options.masks
    everything = replace(
        labelled, name="images", path=images, supervision="none", split=None, slots=2,
        batch_per_slot=4,
    )  # fmt: skip
    run = options.run(
        options.name_of("three_stage", "folder"),
        sources=(labelled, everything),
        method=ThreeStageConfig(),
        backbone=BackboneConfig(
            options.backbone, options.weights, output_stride=8, drop_path=0.0, frozen_batchnorm=True
        ),
        validation=ValidationConfig(options.val, "val", mode="whole", resize=resize),
        steps=20_000,
        optimizer=ADAM,
    )
    first = replace(labelled, slots=2, batch_per_slot=5)
    return three_stages(options, run, first=first)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return options.vocabularies(images=options.images or options.masks)


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
