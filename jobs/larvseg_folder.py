"""LarvSeg on your own pictures: masks of some classes, image labels of more.

    python datasets/folder.py masks --images ... --masks ... --classes ... --out shards/masks
    python datasets/folder.py classes --root ... --out shards/labelled
    python jobs/larvseg_folder.py --masks shards/masks --labels shards/labelled --val shards/val
    python jobs/larvseg_folder.py ... --novel cat dog     # hide the masks of these, and score them

Classes are told apart by uid: the same uid in two data sets is one class. The backbone is the
paper's ViT-B/16 from the hub; another net and a file of its weights (jobs/pretrain_folder.py) come
with --backbone.name and --backbone.pretrained. Cost and score depend on the data; docs/results.md
has those of a run on 4,235 COCO and ImageNet-like pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memseg_dist.config import LaunchConfig, RunConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.evaluation.lookup import find_classes
from memseg_dist.methods.larvseg import LarvSegConfig
from memseg_dist.models.backbone import BackboneConfig
from memseg_dist.runtime.jobs import Job, main

SMOKE_CLASSES = Vocabulary(tuple(Category(f"name:{name}", name) for name in ("ant", "bee", "cat")))


@dataclass(frozen=True)
class LarvSegFolder(Job):
    """LarvSeg on your own pictures."""

    masks: str = "shards/masks"
    """Shards with pixel masks."""
    labels: tuple[str, ...] = ("shards/labelled",)
    """Shards whose image labels are used (their masks, if any, are not)."""
    val: str = "shards/val"
    """Shards with masks to score on; every class of their vocabulary competes."""
    novel: tuple[str, ...] = ()
    """Classes (name or uid) whose masks are hidden in training; the others of --val are base."""
    crop: int = 512
    """Side of the training crops in pixels; the shortest side of a picture is scaled to it."""
    baseline: bool = False
    """The paper's baseline: no memory, no attentive loss."""

    def config(self) -> RunConfig:
        augment = AugmentConfig(crop=self.crop, resize=(4 * self.crop, self.crop))
        labelled = [
            Source(name, path, "labels", 2, 2, augment) for name, path in self._labels.items()
        ]
        base, novel, hidden = self._groups() if self.novel else ((), (), ())
        return RunConfig(
            name="baseline_folder" if self.baseline else "larvseg_folder",
            storage="runs",
            sources=(
                Source("masks", self.masks, "masks", 4, 2, augment, exclude=hidden),
                *labelled,
            ),
            method=LarvSegConfig(attention="off" if self.baseline else "cross_image"),
            backbone=BackboneConfig(pretrained="hub", image_size=self.crop),
            validation=ValidationConfig(
                self.val,
                name="val",
                resize=(4 * self.crop, self.crop),
                window=self.crop,
                stride=self.crop,
                base=base,
                novel=novel,
            ),
            steps=20_000,
            launch=LaunchConfig(workers=(1, 4)),
        )

    def _groups(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """uids: base and novel classes of --val, and the novel ones that --masks has to hide."""
        vocabularies = self.vocabularies()
        scored = vocabularies["val"]
        novel = tuple(scored.uids[index] for index in find_classes(scored, self.novel))
        base = tuple(uid for uid in scored.uids if uid not in novel)
        return base, novel, tuple(uid for uid in novel if uid in vocabularies["masks"])

    def vocabularies(self) -> Mapping[str, Vocabulary]:
        if self.smoke:
            return dict.fromkeys(("masks", "val", "validation", *self._labels), SMOKE_CLASSES)
        paths = {"masks": self.masks, "val": self.val, **self._labels}
        return {name: Vocabulary.load(f"{path}/vocabulary.json") for name, path in paths.items()}

    @property
    def _labels(self) -> dict[str, str]:
        return {f"labels_{number}": path for number, path in enumerate(self.labels)}


if __name__ == "__main__":
    main(LarvSegFolder, __doc__)
