"""RCA on your own pictures: image labels in, a segmenter out.

    python datasets/folder.py classes --root ... --out shards/labelled
    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/val
    python jobs/rca_folder.py --labels shards/labelled --val shards/val

The classifier learns from all of `--labels`; the pictures of the first get pseudo labels, on which
the segmenter trains. Classes are told apart by uid; those of `--val` take part, whose vocabulary
needs the uid "background" for all the rest. The backbones are ResNet-50s from the hub; other nets
and files of their weights (jobs/pretrain_folder.py) come with --classifier.backbone.name,
.pretrained and --segmenter.backbone.name. Cost and score depend on the data; docs/results.md has
those of a run on COCO and ImageNet-like pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from folder_setup import labelled, read_vocabularies
from rca_pipeline import SEGMENTER_OPTIMIZER, RCAOptions, rca_stages

from memseg_dist.config import OptimizerConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import BACKGROUND, Vocabulary
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage, result


@dataclass(frozen=True)
class Options(RCAOptions):
    """RCA on your own pictures."""

    labels: tuple[str, ...] = ("shards/labelled",)
    """Shards whose image labels are used (their masks, if any, are not); the first get masks."""
    val: str = "shards/val"
    """Shards with masks to score on."""
    crop: int = 368
    """Side of the classifier's pictures in pixels, whatever their ratio, and of the segmenter's
    crops."""


def stages(options: Options) -> dict[str, Stage]:
    known, crop = vocabularies(options), options.crop
    scored = set(known["val"].uids) - {BACKGROUND}
    whole = AugmentConfig(
        resize=(crop, crop),
        scale_range=(1.0, 1.0),
        crop=crop,
        keep_ratio=False,
        category_max_ratio=1.0,
    )
    parts = AugmentConfig(crop=crop, resize=(4 * crop, crop), category_max_ratio=1.0)
    classifier = options.run(
        options.name_of("folder"),
        sources=tuple(
            Source(name, path, "labels", 4, 2, whole, hide_mask=True,
                   exclude=tuple(uid for uid in known[name].uids if uid not in scored))
            for name, path in labelled(options.labels).items()
        ),
        method=RCAConfig(reduce_to=512),
        backbone=BackboneConfig("resnet50.a1_in1k", "hub", output_stride=8, drop_path=0.0),
        validation=ValidationConfig(
            options.val, "val", mode="whole", resize=(crop, crop), exclude=(BACKGROUND,)
        ),
        steps=20_000,
        optimizer=OptimizerConfig(
            lr=1e-2, nesterov=True, weight_decay=5e-4, backbone_lr_scale=0.1, bias_lr_scale=2.0
        ),
    )  # fmt: skip
    segmenter = replace(
        classifier,
        sources=(Source("pseudo", result("labels"), "masks", 4, 2, parts),),
        method=SegmentConfig(),
        validation=ValidationConfig(options.val, "val", mode="whole", resize=(4 * crop, crop)),
        optimizer=SEGMENTER_OPTIMIZER,
    )
    return rca_stages(options, classifier, segmenter)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    paths = {"val": options.val, **labelled(options.labels)}
    return read_vocabularies(paths, smoke=options.smoke, names=(BACKGROUND, "ant", "bee"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
