"""RCA on COCO 2014: 82,783 images with image labels of 80 classes, masks for nothing but scores.

    python datasets/coco2014.py --root coco --out shards/coco2014
    python jobs/rca_coco.py --launch.workers 4

Cost: 310,440 steps of 8 images at 368 x 368 (30 epochs), the label maps, then 100,000 steps of
DeepLabV2; not run here. Expected by the paper: segmentation 36.8 mIoU on val on top of EPS (35.7),
26.7 on top of OAA+ (24.6). The paper keeps 500 rows per class "to avoid significant memory
consumption"; all 240,000 rows are 0.5 GB, spread over the workers, so all are kept here.
`--method.capacity 500` is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rca_voc import (
    AUGMENT,
    BACKBONES,
    BATCH,
    EPOCHS,
    SEGMENTER_AUGMENT,
    SEGMENTER_BACKBONE,
    SEGMENTER_OPTIMIZER,
    optimizer,
)

from memseg_dist.config import Intervals, LaunchConfig, RunConfig, ValidationConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.rca_config import RCAConfig
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.runtime.jobs import main, vocabulary
from memseg_dist.runtime.road import BACKGROUND, Road

NUM_IMAGES = 82_783
EPOCH_STEPS = -(-NUM_IMAGES // BATCH)


@dataclass(frozen=True)
class RcaCoco(Road):
    """RCA on COCO 2014."""

    data: str = "shards/coco2014"
    """Folder that datasets/coco2014.py wrote."""

    def config(self) -> RunConfig:
        source = Source(
            "coco", f"{self.data}/train", "labels", 4, 2, AUGMENT,
            hide_mask=True, exclude=(BACKGROUND,), saliency=self.saliency if self.eps else None,
        )  # fmt: skip
        return RunConfig(
            name="oaa_coco" if self.baseline else "rca_coco",
            storage="runs",
            sources=(source,),
            method=self.method(RCAConfig(saliency_foreground=0.9)),  # EPS on COCO
            backbone=BACKBONES["vgg16"],
            validation=ValidationConfig(
                f"{self.data}/val", mode="whole", resize=(368, 368), exclude=(BACKGROUND,),
                max_images=2000,
            ),
            steps=EPOCHS * EPOCH_STEPS,
            optimizer=optimizer(EPOCH_STEPS),
            launch=LaunchConfig(workers=(1, 4)),
            every=Intervals(log=50, evaluate=5 * EPOCH_STEPS, checkpoint=2000),
        )  # fmt: skip

    def segmenter(self, config: RunConfig, labels: str) -> RunConfig:
        assert config.validation is not None
        validation = replace(config.validation, resize=(513, 513), exclude=(), max_images=None)
        return replace(
            config,
            sources=(Source("pseudo", labels, "masks", 5, 2, SEGMENTER_AUGMENT),),
            method=SegmentConfig(),
            backbone=SEGMENTER_BACKBONE,
            validation=validation,
            optimizer=SEGMENTER_OPTIMIZER,
            steps=100_000,
            every=Intervals(log=50, evaluate=25_000, checkpoint=1000),
        )

    def vocabularies(self) -> Mapping[str, Vocabulary]:
        return dict.fromkeys(("coco", "validation"), vocabulary("coco_81"))


if __name__ == "__main__":
    main(RcaCoco, __doc__)
