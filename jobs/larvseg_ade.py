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
TFLOP/s. Deviations from the paper's code are listed with their flags in methods/larvseg/method.py;
without a flag: the whole vocabulary in every softmax, where the code samples 100 classes of A847.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from larvseg_paper import Protocol, larvseg_run

from memseg_dist.config import Intervals
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.pipeline import JobOptions, main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary

SUBSET = {150: "imagenet_124", 847: "imagenet_585"}
"""The ImageNet synsets that are ADE classes."""


@dataclass(frozen=True)
class Options(JobOptions):
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


def stages(options: Options) -> dict[str, Stage]:
    data, ade, subset = options.data, f"ade20k_{options.classes}", SUBSET[options.classes]
    large = AugmentConfig(crop=512, resize=(2048, 512))
    small = AugmentConfig(crop=320, resize=(320, 320))
    slots = 3 if options.imagenet else 4
    sources = [
        Source("coco_stuff", f"{data}/coco_stuff/train", "masks", slots, 2, large),
        Source("weak_ade", f"{data}/{ade}/train", "labels", slots, 2, large, labels_from="crop"),
    ]
    if options.imagenet:
        sources.append(Source("imagenet", f"{data}/{subset}/train", "labels", 2, 2, small))
    run = larvseg_run(
        f"{ade}{'_in' * options.imagenet}",
        tuple(sources),
        vocabularies(options),
        f"{data}/{ade}/val",
        protocol=options.protocol,
        baseline=options.baseline,
        cls_weight=0.1 if options.classes == 150 and not options.imagenet else 0.2,
        distance_threshold=2.0 if options.classes == 150 else 1.0,
        steps=320_000,
        every=Intervals(),
    )
    return {"train": run}


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    ade = vocabulary(f"ade20k_{options.classes}")
    known = {"coco_stuff": vocabulary("coco_stuff_171"), "weak_ade": ade, "ade": ade}
    subset = {"imagenet": vocabulary(SUBSET[options.classes])} if options.imagenet else {}
    return known | subset


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
