r"""MCIBI on your own pictures with masks: FCN, PSPNet, DeepLabV3, OCRNet or UPerNet, and a memory.

    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/train
    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/val
    python jobs/mcibi_folder.py --masks shards/train --val shards/val --method.context aspp
    python jobs/mcibi_folder.py ... --method.memory off            # the same segmenter without it

The backbone is a ResNet-50 of the hub at output stride 8. Another net and a file of its weights:
--backbone.name and --backbone.pretrained; a transformer has no output stride, and a ViT names its
stages, as --backbone.output-stride None --method.stages 2 5 8 11. Memory and heads need masks of
every class of --masks; those of --val that --masks lacks go into --validation.exclude. Cost and
score depend on the data; docs/results.md has those of runs on 367 street scenes.
"""

from __future__ import annotations

from dataclasses import dataclass

from folder_setup import MaskOptions

from memseg_dist.config import LaunchConfig, OptimizerConfig, RunConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage


@dataclass(frozen=True)
class Options(MaskOptions):
    """MCIBI on your own pictures with masks."""


def stages(options: Options) -> dict[str, Stage]:
    crop, resize = options.crop, (4 * options.crop, options.crop)
    run = RunConfig(
        name="mcibi_folder",
        storage="runs",
        sources=(
            Source("masks", options.masks, "masks", 2, 8, AugmentConfig(crop=crop, resize=resize)),
        ),
        method=MCIBIConfig(),
        backbone=BackboneConfig("resnet50.a1_in1k", "hub", output_stride=8, drop_path=0.0),
        validation=ValidationConfig(options.val, "val", mode="whole", resize=resize),
        steps=20_000,
        optimizer=OptimizerConfig(lr=0.01, weight_decay=5e-4, min_lr=1e-4),
        launch=LaunchConfig(workers=(1, 2)),
    )
    return {"train": run}


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return options.vocabularies()


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
