r"""PseudoSeg on your own pictures: masks of a few, and all of them.

    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/train
    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/val
    memseg data split shards/train 1/16 --rule every-class
    python jobs/pseudoseg_folder.py --masks shards/train --split 1_16-seed0 --val shards/val
    python jobs/pseudoseg_folder.py --masks shards/few --images shards/more --val shards/val

Pictures without masks are those of --images, by default all of --masks. --image-labels image uses
their image labels too. Masks with a class of all the rest need its uid: --train.method.background.
The backbone is a ResNet-50 of the hub; another net and a file of its weights:
--train.backbone.name and --train.backbone.pretrained. Cost and score depend on the data;
docs/results.md has those of runs on street scenes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from folder_setup import MaskOptions
from pseudoseg_recipes import NETS, PseudoSegOptions, all_images, pseudoseg_stages

from memseg_dist.config import OptimizerConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.pseudoseg.config import PseudoSegConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage


@dataclass(frozen=True)
class Options(MaskOptions, PseudoSegOptions):
    """PseudoSeg on your own pictures."""

    images: str | None = None
    """Shards of pictures without masks; by default those of --masks, all of them."""


def stages(options: Options) -> dict[str, Stage]:
    crop, resize = options.crop, (4 * options.crop, options.crop)
    augment = AugmentConfig(crop=crop, resize=resize, photometric=False)
    labelled = Source("masks", options.masks, "masks", 2, 4, augment, labels_from="crop",
                      split=options.split)  # fmt: skip
    everything = replace(labelled, name="images", path=options.images or options.masks)
    run = options.run(
        options.name_of("pseudoseg", "folder"),
        sources=(labelled, all_images(options, everything)),
        method=PseudoSegConfig(),
        backbone=NETS["resnet50"],
        validation=ValidationConfig(options.val, "val", mode="whole", resize=resize),
        steps=20_000,
        optimizer=OptimizerConfig(lr=0.007, min_lr=0.0, weight_decay=1e-4, bias_lr_scale=2.0),
    )
    return pseudoseg_stages(options, run)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return options.vocabularies(images=options.images or options.masks)


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
