"""RCA on your own pictures: image labels in, a segmenter out.

    python datasets/folder.py classes --root ... --out shards/labelled
    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/val
    python jobs/rca_folder.py --labels shards/labelled --val shards/val

The classifier learns from all of `--labels`; the pictures of the first get pseudo masks, on which
the segmenter trains. Classes are told apart by uid; those of `--val` take part, whose vocabulary
needs the uid "background" for all the rest. The backbones are ResNet-50s from the hub; other nets
and files of their weights (jobs/pretrain_folder.py) come with --backbone.name, .pretrained and
--segmenter.backbone.name. Cost and score depend on the data; docs/results.md has those of a run on
COCO and ImageNet-like pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rca_voc import SEGMENTER_OPTIMIZER

from memseg_dist.config import LaunchConfig, OptimizerConfig, RunConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.methods.rca_config import RCAConfig
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.models.backbone import BackboneConfig
from memseg_dist.runtime.jobs import main
from memseg_dist.runtime.road import BACKGROUND, Road

SMOKE_CLASSES = Vocabulary(
    tuple(Category(uid, uid.removeprefix("name:")) for uid in (BACKGROUND, "name:ant", "name:bee"))
)
RESNET = BackboneConfig("resnet50.a1_in1k", "hub", output_stride=8, drop_path=0.0)


@dataclass(frozen=True)
class RcaFolder(Road):
    """RCA on your own pictures."""

    labels: tuple[str, ...] = ("shards/labelled",)
    """Shards whose image labels are used (their masks, if any, are not); the first get masks."""
    val: str = "shards/val"
    """Shards with masks to score on."""
    crop: int = 368
    """Side of the classifier's pictures in pixels, whatever their ratio, and of the segmenter's
    crops."""

    def config(self) -> RunConfig:
        vocabularies = self.vocabularies()
        scored = set(vocabularies["val"].uids) - {BACKGROUND}
        augment = AugmentConfig(
            crop=self.crop, scale_range=(1.0, 1.0), keep_ratio=False, category_max_ratio=1.0
        )
        sources = tuple(
            Source(
                name, path, "labels", 4, 2, augment, hide_mask=True,
                exclude=tuple(uid for uid in vocabularies[name].uids if uid not in scored),
                saliency=self.saliency if self.eps else None,
            )
            for name, path in self._labels.items()
        )  # fmt: skip
        return RunConfig(
            name="oaa_folder" if self.baseline else "rca_folder",
            storage="runs",
            sources=sources,
            method=self.method(RCAConfig(reduce_to=512)),
            backbone=RESNET,
            validation=ValidationConfig(
                self.val,
                name="val",
                mode="whole",
                resize=(self.crop, self.crop),
                exclude=(BACKGROUND,),
            ),
            steps=20_000,
            optimizer=OptimizerConfig(
                lr=1e-2, nesterov=True, weight_decay=5e-4, backbone_lr_scale=0.1, bias_lr_scale=2.0
            ),
            launch=LaunchConfig(workers=(1, 4)),
        )

    def segmenter(self, config: RunConfig, labels: str) -> RunConfig:
        assert config.validation is not None
        side = config.sources[0].augment.crop
        augment = AugmentConfig(crop=side, resize=(4 * side, side), category_max_ratio=1.0)
        return replace(
            config,
            sources=(Source("pseudo", labels, "masks", 4, 2, augment),),
            method=SegmentConfig(),
            validation=replace(config.validation, resize=(4 * side, side), exclude=()),
            optimizer=SEGMENTER_OPTIMIZER,
        )

    def vocabularies(self) -> Mapping[str, Vocabulary]:
        if self.smoke:
            return dict.fromkeys(("val", "validation", *self._labels), SMOKE_CLASSES)
        paths = {"val": self.val, **self._labels}
        return {name: Vocabulary.load(f"{path}/vocabulary.json") for name, path in paths.items()}

    @property
    def _labels(self) -> dict[str, str]:
        return {f"labels_{number}": path for number, path in enumerate(self.labels)}


if __name__ == "__main__":
    main(RcaFolder, __doc__)
