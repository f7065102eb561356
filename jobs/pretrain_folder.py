r"""A backbone for your own pictures: image classification of labelled shards.

    python jobs/pretrain_folder.py --labels shards/labelled --train.backbone.name resnet18
    python jobs/larvseg_folder.py ... --backbone.name resnet18 \
        --backbone.pretrained runs/pretrain_folder/backbone.safetensors

An image with several labels counts for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from folder_setup import labelled, read_vocabularies

from memseg_dist.config import LaunchConfig, OptimizerConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import PipelineOptions, main
from memseg_dist.stages import ExportConfig, Stage, result


@dataclass(frozen=True)
class Options(PipelineOptions):
    """Image classification of your own pictures."""

    labels: tuple[str, ...] = ("shards/labelled",)
    """Shards whose image labels are learned."""
    crop: int = 224
    """Side of the training crops in pixels; the shortest side of a picture is scaled to it."""
    launch: LaunchConfig = LaunchConfig(workers=(1, 2))


def stages(options: Options) -> dict[str, Stage]:
    augment = AugmentConfig(crop=options.crop, resize=(4 * options.crop, options.crop))
    sources = labelled(options.labels).items()
    run = options.run(
        options.name or "pretrain_folder",
        sources=tuple(Source(*source, "labels", 2, 16, augment) for source in sources),
        method=ClassifyConfig(),
        backbone=BackboneConfig("resnet18", drop_path=0.0, output_stride=8),
        steps=5_000,
        optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05),
    )
    return {
        "train": run,
        "export": ExportConfig(result("train"), result("train") + "/backbone.safetensors"),
    }


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return read_vocabularies(labelled(options.labels), smoke=options.smoke)


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
