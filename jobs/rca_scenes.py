"""RCA on the generated scenes: from image labels to segmentation masks on a laptop.

    python datasets/scenes.py --root data/scenes
    python datasets/scenes_weak.py --root data/scenes_weak
    python jobs/pretrain_scenes.py                       # the backbone of all three runs
    python jobs/rca_scenes.py --baseline
    python jobs/rca_scenes.py

Cost on two CPU cores, with two DeepSpeed workers on a local Ray cluster: 7 minutes for 500 steps
of the classifier and 300 of the segmenter (measured; the defaults are 940 and 600). Scores:
docs/results.md; over seeds and variants: benchmarks/study_rca.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from larvseg_scenes import BACKBONE

from memseg_dist.config import (
    Intervals,
    LaunchConfig,
    LoaderConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.evaluation.fusion import FusionConfig
from memseg_dist.methods.rca_config import RCAConfig
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.runtime.jobs import main, recipe
from memseg_dist.runtime.road import BACKGROUND, Road

AUGMENT = AugmentConfig(
    crop=96, scale_range=(1.0, 1.0), keep_ratio=False, photometric=False, category_max_ratio=1.0
)
"""Flips alone: the scenes draw their own scales, colours and light."""
METHOD = RCAConfig(contrast_weight=0.1, gate=0.5, head_width=32, map_size=12)
"""Of the paper's, alpha_1 is 0.01 for a sum over the images, here 0.1 for their mean; a gate of 0.7
lets hardly a region of runs of minutes pass (13 % of the rows were ever set). The width is that of
the heads of `--preset released`."""
FUSION = FusionConfig(background_power=0.25, use_crf=False)
"""A CRF goes by colour, which says nothing here, and the power of 4 is meant for one: without it
maps of 12 x 12 places cover too much. 0.25 is what the baseline likes best of 0.25, 0.5, 1 .. 8."""


@dataclass(frozen=True)
class RcaScenes(Road):
    """RCA on the generated scenes."""

    data: str = "data/scenes_weak"
    """Folder that datasets/scenes_weak.py wrote."""
    backbone: str = "runs/pretrain_scenes/backbone.safetensors"
    """Weights that jobs/pretrain_scenes.py wrote; '' for random ones."""

    def config(self) -> RunConfig:
        source = Source(
            "weak", f"{self.data}/train", "labels", 2, 8, AUGMENT,
            hide_mask=True, exclude=(BACKGROUND,), saliency=self.saliency if self.eps else None,
        )  # fmt: skip
        return RunConfig(
            name="oaa_scenes" if self.baseline else "rca_scenes",
            storage="runs",
            sources=(source,),
            method=self.method(METHOD),
            backbone=replace(BACKBONE, pretrained=self.backbone),
            validation=ValidationConfig(
                f"{self.data}/val", mode="whole", resize=(96, 96), exclude=(BACKGROUND,)
            ),
            steps=940,
            optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.01, warmup_steps=30),
            launch=LaunchConfig(workers=2),
            loader=LoaderConfig(processes=1),
            every=Intervals(log=47, evaluate=470, checkpoint=470),
        )

    def fusion(self) -> FusionConfig:
        return FUSION

    def segmenter(self, config: RunConfig, labels: str) -> RunConfig:
        assert config.validation is not None
        return replace(
            config,
            sources=(Source("pseudo", labels, "masks", 2, 8, AUGMENT),),
            method=SegmentConfig(),
            validation=replace(config.validation, exclude=()),
            steps=600,
            every=Intervals(log=50, evaluate=300, checkpoint=300),
        )

    def truth_of(self, config: RunConfig) -> str | None:
        return self.truth or config.sources[0].path

    def draw(self, config: RunConfig) -> None:
        """A handful of scenes where a `--smoke` config looks for them."""
        scenes = recipe("scenes_weak")
        assert config.validation is not None
        root = Path(config.sources[0].path).parent
        scenes.build(scenes.ScenesWeak(root, train=32, val=4, processes=0))
        (root / "train").rename(config.sources[0].path)
        (root / "val").rename(config.validation.path)


if __name__ == "__main__":
    main(RcaScenes, __doc__)
