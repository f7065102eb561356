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

from dataclasses import dataclass

from folder_setup import labelled, read_vocabularies

from memseg_dist.config import LaunchConfig, RunConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.evaluation.lookup import find_classes
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import JobOptions, main
from memseg_dist.stages import Stage


@dataclass(frozen=True)
class Options(JobOptions):
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


def stages(options: Options) -> dict[str, Stage]:
    crop, resize = options.crop, (4 * options.crop, options.crop)
    augment = AugmentConfig(crop=crop, resize=resize)
    base, novel, hidden = groups(options)
    sources = [
        Source("masks", options.masks, "masks", 4, 2, augment, exclude=hidden),
        *(Source(*item, "labels", 2, 2, augment) for item in labelled(options.labels).items()),
    ]
    run = RunConfig(
        name="baseline_folder" if options.baseline else "larvseg_folder",
        storage="runs",
        sources=tuple(sources),
        method=LarvSegConfig(attention="off" if options.baseline else "cross_image"),
        backbone=BackboneConfig(pretrained="hub", image_size=crop),
        validation=ValidationConfig(
            options.val, "val", resize=resize, window=crop, stride=crop, base=base, novel=novel
        ),
        steps=20_000,
        launch=LaunchConfig(workers=(1, 4)),
    )
    return {"train": run}


def groups(options: Options) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """uids: base and novel classes of --val, and the novel ones that --masks has to hide."""
    if not options.novel:
        return (), (), ()
    known = vocabularies(options)
    uids = known["val"].uids
    novel = tuple(uids[index] for index in find_classes(known["val"], options.novel))
    base = tuple(uid for uid in uids if uid not in novel)
    return base, novel, tuple(uid for uid in novel if uid in known["masks"])


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    paths = {"masks": options.masks, "val": options.val, **labelled(options.labels)}
    return read_vocabularies(paths, smoke=options.smoke)


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
