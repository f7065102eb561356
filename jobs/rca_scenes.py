"""RCA on the generated scenes: from image labels to segmentation masks on a laptop.

    python datasets/scenes.py --root data/scenes
    python datasets/scenes_weak.py --root data/scenes_weak
    python jobs/pretrain_scenes.py                       # the backbone of all runs
    python jobs/rca_scenes.py --baseline
    python jobs/rca_scenes.py

Cost on two CPU cores, with two DeepSpeed workers on a local Ray cluster: 7 minutes for 500 steps
of the classifier and 300 of the segmenter (measured; the defaults are 940 and 600). Scores:
docs/results.md; over seeds and variants: benchmarks/study_rca.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rca_pipeline import RCAOptions, rca_stages
from scenes_setup import BACKBONE, NUM_OBJECTS, OPTIMIZER

from memseg_dist.config import (
    Intervals,
    LaunchConfig,
    LoaderConfig,
    ValidationConfig,
)
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import BACKGROUND, Vocabulary
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.methods.rca.fusion import FusionConfig
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage, result
from memseg_dist.tools.shipped import recipe

METHOD = RCAConfig(contrast_weight=0.1, gate=0.5, head_width=32, map_size=12)
"""Of the paper's, alpha_1 is 0.01 for a sum over the images, here 0.1 for their mean; a gate of 0.7
lets hardly a region of runs of minutes pass (13 % of the rows were ever set). The width is that of
the heads of `--preset released`."""
FUSION = FusionConfig(background_power=0.25, use_crf=False)
"""A CRF goes by colour, which says nothing here, and the power of 4 is meant for one: without it
maps of 12 x 12 positions cover too much. 0.25 is what suits the baseline best of 0.25, 0.5, 1 .. 8.
"""


@dataclass(frozen=True)
class Options(RCAOptions):
    """RCA on the generated scenes."""

    data: str = "data/scenes_weak"
    """Folder that datasets/scenes_weak.py wrote."""
    backbone: str = "runs/pretrain_scenes/backbone.safetensors"
    """Weights that jobs/pretrain_scenes.py wrote; '' for random ones."""
    launch: LaunchConfig = LaunchConfig(workers=2)


def stages(options: Options) -> dict[str, Stage]:
    train, val = f"{options.data}/train", f"{options.data}/val"
    augment = AugmentConfig((96, 96), (1.0, 1.0), crop=96, keep_ratio=False, photometric=False,
                            category_max_ratio=1.0)  # fmt: skip
    source = Source("weak", train, "labels", 2, 8, augment, hide_mask=True, exclude=(BACKGROUND,))
    classifier = options.run(
        options.name_of("scenes"),
        sources=(source,),
        method=METHOD,
        backbone=replace(BACKBONE, pretrained=options.backbone),
        validation=ValidationConfig(val, mode="whole", resize=(96, 96), exclude=(BACKGROUND,)),
        steps=940,
        optimizer=OPTIMIZER,
        loader=LoaderConfig(processes=1),
        every=Intervals(log=47, evaluate=470, checkpoint=470),
    )
    segmenter = replace(
        classifier,
        sources=(Source("pseudo", result("labels"), "masks", 2, 8, augment),),
        method=SegmentConfig(),
        validation=ValidationConfig(val, mode="whole", resize=(96, 96)),
        steps=600,
        every=Intervals(log=50, evaluate=300, checkpoint=300),
    )
    return rca_stages(options, classifier, segmenter, fusion=FUSION, truth=train)


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    vocabulary = recipe("scenes_weak").vocabulary(NUM_OBJECTS)
    return dict.fromkeys(("weak", "validation"), vocabulary)


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
