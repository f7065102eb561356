"""RCA on COCO 2014: 82,783 images with image labels of 80 classes, masks for nothing but scores.

    python datasets/coco2014.py --root coco --out shards/coco2014
    python jobs/rca_coco.py --launch.workers 4

Cost: 310,440 steps of 8 images at 368 x 368 (30 epochs), the pseudo labels, then 100,000 steps of
DeepLabV2; not run here. Expected by the paper (VGG16): segmentation 36.8 mIoU on val on top of EPS
(35.7), with --eps --saliency FOLDER; 26.7 on top of OAA+ (24.6), whose integral attention is not
here. All four are with a dense CRF, the run's own scores without. With one:

    memseg eval --checkpoint runs/rca_coco_segmenter --crf --memory 3100

The paper keeps 500 rows per class "to avoid significant memory consumption"; all 240,000 rows are
0.5 GB, spread over the workers, so all are kept here. `--classifier.method.capacity 500` is the
paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

from rca_pipeline import AUGMENT, VGG16, RCAOptions, published

from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import BACKGROUND, Vocabulary
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary


@dataclass(frozen=True)
class Options(RCAOptions):
    """RCA on COCO 2014."""

    data: str = "shards/coco2014"
    """Folder that datasets/coco2014.py wrote."""


def stages(options: Options) -> dict[str, Stage]:
    source = Source("coco", f"{options.data}/train", "labels", 4, 2, AUGMENT,
                    hide_mask=True, exclude=(BACKGROUND,))  # fmt: skip
    return published(
        options,
        source,
        f"{options.data}/val",
        num_images=82_783,
        name="coco",
        method=RCAConfig(saliency_foreground=0.9),  # EPS on COCO
        backbone=VGG16,
        segmenter_steps=100_000,
        max_images=2000,
    )


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("coco", "validation"), vocabulary("coco_81"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
