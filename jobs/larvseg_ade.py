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
    Table 4: --imagenet --method.source-weights weak_ade/aux 0    32.1 / 40.8 / 26.6
             --imagenet --method.source-weights imagenet/aux 0    33.1 / 41.0 / 28.2
    Table 5: --method.attention single_image                      30.1 / 38.6 / 24.8
    Table 1: --segmenter, novel by `memseg eval --prototype-probe`  48.6 (A847: 36.1); trained on
             ADE20K, --segmenter --sources.0.slots 0 --sources.1.slots 8
             --sources.1.supervision masks                        49.0 (A847: 37.8)

Where the paper's text is not what its figures come from, the official code is followed:
  - lambda_cls is 0.2 but for C171 + WA150; the paper says 0.1 throughout: --method.cls-weight 0.1.
  - The "image labels" of WA150 and WA847 are the classes of the mask inside the crop, and the mask
    has a say in where the crop is. So pixel masks of novel classes leak into training, which the
    paper does not mention. True image labels: --sources.1.labels-from index --sources.1.hide-mask.

Cost: 320,000 steps of 16 crops are 3.3e18 operations (computed, not run): 18 GPU hours at 50
TFLOP/s. Deviations from the paper's code are listed with their flags in methods/larvseg/method.py;
without a flag: the whole vocabulary in every softmax, where the code samples 100 classes of A847.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from larvseg_paper import Kind, Protocol, larvseg_run

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
    segmenter: bool = False
    """Table 1's basic segmenter: masks alone. The other sources have no slots and give only their
    classes."""
    protocol: Protocol = "table3"
    """Which classes are one class, and which are novel; `wordnet` is the sound one."""


def stages(options: Options) -> dict[str, Stage]:
    data, ade, subset = options.data, f"ade20k_{options.classes}", SUBSET[options.classes]
    large = AugmentConfig(crop=512, resize=(2048, 512))
    small = AugmentConfig(crop=320, resize=(320, 320))
    slots = (3, 3, 2) if options.imagenet else (4, 4, 0)
    kind: Kind = "baseline" if options.baseline else "larvseg"
    if options.segmenter:
        slots, kind = (8, 0, 0), "segmenter"
    sources = [
        Source("coco_stuff", f"{data}/coco_stuff/train", "masks", slots[0], 2, large),
        Source("weak_ade", f"{data}/{ade}/train", "labels", slots[1], 2, large, labels_from="crop"),
    ]
    if options.imagenet:
        sources.append(Source("imagenet", f"{data}/{subset}/train", "labels", slots[2], 2, small))
    run = larvseg_run(
        f"{ade}{'_in' * options.imagenet}",
        tuple(sources),
        vocabularies(options),
        f"{data}/{ade}/val",
        protocol=options.protocol,
        kind=kind,
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
