r"""LarvSeg on ADE20K: COCO-Stuff masks, image labels of ADE20K (and ImageNet); paper, Table 3.

    python jobs/larvseg_ade.py                                # C171 + WA150
    python jobs/larvseg_ade.py --classes 847 --imagenet       # C171 + WA847 + I585
    ray job submit --working-dir . -- python jobs/larvseg_ade.py \
        --data /shared/data --storage /shared/runs

Data: datasets/coco_stuff.py, datasets/ade20k.py, datasets/imagenet21k.py (the subsets of 124 and
585 synsets), each with --out DATA/NAME. Not run here. Expected, from the paper (A150 or A847: All
/ Base / Novel; split `table3`):

    C171 + WA150          baseline 28.5 / 40.9 / 20.8    LarvSeg 32.4 / 41.3 / 26.8
    C171 + WA150 + I124   baseline 31.3 / 40.7 / 25.3    LarvSeg 33.7 / 41.3 / 28.8
    C171 + WA847          baseline  8.9 / 28.7 /  6.6    LarvSeg 10.9 / 29.0 /  8.7
    C171 + WA847 + I585   baseline 11.9 / 28.5 /  9.9    LarvSeg 13.2 / 30.4 / 11.1

Cost: 320,000 steps of 16 crops are 3.3e18 operations (computed, not run): 18 GPU hours at 50
TFLOP/s.

Deviations from the paper's code, with a flag for each under --method: one memory for all workers,
padding masked out, COCO-Stuff names that fall together are one column, a class is no background
before its memory is full. Without a flag: the whole vocabulary in every softmax, where the code
samples 100 classes of A847.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from memseg_dist.config import LaunchConfig, RunConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.splits import Protocol, Split, split
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.larvseg import LarvSegConfig
from memseg_dist.models.backbone import BackboneConfig
from memseg_dist.runtime.jobs import Job, main, relabelling, vocabulary, write_relabelling


@dataclass(frozen=True)
class LarvSegAde(Job):
    """LarvSeg on ADE20K."""

    data: str = "data"
    """Folder or URL of the shards."""
    classes: Literal[150, 847] = 150
    """Vocabulary of ADE20K."""
    imagenet: bool = False
    """Add the ImageNet synsets that are ADE classes: I124, or I585 with --classes 847."""
    baseline: bool = False
    """The paper's baseline: no memory, no attentive loss."""
    protocol: Protocol = "table3"
    """Which classes are one class, and which are novel; `wordnet` is the sound one."""

    def config(self) -> RunConfig:
        ade = f"ade20k_{self.classes}"
        resize = AugmentConfig(crop=512, resize=(2048, 512))
        slots = 3 if self.imagenet else 4
        masks = Source(
            "coco_stuff",
            f"{self.data}/coco_stuff/train",
            "masks",
            slots,
            2,
            resize,
        )
        weak = Source(
            "weak_ade",
            f"{self.data}/{ade}/train",
            "labels",
            slots,
            2,
            resize,
            labels_from="crop",
        )
        objects = Source(
            "imagenet",
            f"{self.data}/imagenet_{124 if self.classes == 150 else 585}/train",
            "labels",
            2,
            2,
            AugmentConfig(crop=320, resize=(320, 320)),
        )
        small = self.classes == 150 and not self.imagenet
        return RunConfig(
            name=f"{'baseline' if self.baseline else 'larvseg'}_{ade}{'_in' * self.imagenet}",
            storage="runs",
            sources=(masks, weak, objects) if self.imagenet else (masks, weak),
            method=LarvSegConfig(
                attention="off" if self.baseline else "cross_image",
                cls_weight=0.1 if small else 0.2,
                aux_weight=0.1,
                distance_threshold=2.0 if self.classes == 150 else 1.0,
            ),
            backbone=BackboneConfig(
                "vit_base_patch16_384.augreg_in21k_ft_in1k", pretrained="hub", image_size=512
            ),
            validation=ValidationConfig(
                f"{self.data}/{ade}/val",
                name="ade",
                base=tuple(sorted(self.split.base)),
                novel=tuple(sorted(self.split.novel)),
            ),
            steps=320_000,
            launch=LaunchConfig(workers=(1, 8)),
            relabel=relabelling(self.split, self.data),
        )

    @cached_property
    def split(self) -> Split:
        vocabularies = self.vocabularies()
        return split(self.protocol, vocabularies, masks=["coco_stuff"], test="ade")

    def vocabularies(self) -> Mapping[str, Vocabulary]:
        ade = vocabulary(f"ade20k_{self.classes}")
        sources = {"coco_stuff": vocabulary("coco_stuff_171"), "weak_ade": ade, "ade": ade}
        if self.imagenet:
            sources["imagenet"] = vocabulary(f"imagenet_{124 if self.classes == 150 else 585}")
        return sources

    def prepare(self, config: RunConfig) -> None:
        write_relabelling(self.split, config)


if __name__ == "__main__":
    main(LarvSegAde, __doc__)
