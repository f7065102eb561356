"""What the jobs of PseudoSeg share: its recipe, and those that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from semi_supervised import SemiOptions, self_training, supervised

from memseg_dist.config import RunConfig
from memseg_dist.data.loader import Source
from memseg_dist.methods.pseudoseg.config import PseudoSegConfig, released
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.stages import Stage

HALF = (0.5, 0.5, 0.5)
NETS = {
    "xception65": BackboneConfig(
        "xception65.ra3_in1k", "hub", output_stride=16, drop_path=0.0, mean=HALF, std=HALF
    ),
    "resnet50": BackboneConfig("resnet50c.gluon_in1k", "hub", output_stride=16, drop_path=0.0),
    "resnet101": BackboneConfig("resnet101c.gluon_in1k", "hub", output_stride=16, drop_path=0.0),
}
"""The paper's: ResNets with a stem of three 3 x 3 convolutions."""


@dataclass(frozen=True)
class PseudoSegOptions(SemiOptions):
    """PseudoSeg from few masks."""

    image_labels: Literal["none", "image", "crop"] = "none"
    """What else is known of all images: nothing, which classes each shows, or (as the public code
    has it) which classes each crop shows, by its hidden mask."""
    preset: Literal["decided", "released"] = "decided"
    """Where paper and code differ: our decisions, or the public code."""


def all_images(options: PseudoSegOptions, source: Source) -> Source:
    """`source` without its masks, and with the image labels that the options ask for."""
    kind = options.image_labels
    return replace(
        source,
        supervision="none" if kind == "none" else "labels",
        hide_mask=True,
        labels_from="crop" if kind == "crop" else "index",
        split=None,
    )


def pseudoseg_stages(
    options: PseudoSegOptions, run: RunConfig, *, truth: str | None = None
) -> dict[str, Stage]:
    """run: PseudoSeg's, whose sources are those with masks and, last, all images. truth: shards
    with masks of all images, to score the labels of self-training.
    """
    method = run.method
    assert isinstance(method, PseudoSegConfig)
    if options.preset == "released":
        method = released(method)
    plain = replace(method, pseudo_label="none")
    if options.recipe == "supervised":
        return {"train": supervised(run, plain, run.sources[:-1])}
    if options.recipe == "self-training":
        return self_training(options, run, plain, truth=truth)
    return {"train": replace(run, method=method)}
