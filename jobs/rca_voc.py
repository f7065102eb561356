"""RCA on PASCAL VOC 2012, from the image labels of the 10,582 augmented images.

    python datasets/voc2012.py --root VOCdevkit/VOC2012 --out shards/voc2012 --sbd SBD/dataset
    python jobs/rca_voc.py --launch.workers 4

Cost: 39,690 steps of 8 images at 368 x 368 (30 epochs), the pseudo labels (the CRF takes about a
second per image and core), then 20,000 steps of DeepLabV2; not run here. Expected by the paper
(VGG16): pseudo labels 71.4 mIoU on train (OAA++ 68.2), segmentation 70.6 on val (67.7).
  - Its segmentation scores are with a dense CRF, the run's own without. With one:
    memseg eval --checkpoint runs/rca_voc_segmenter --crf
  - OAA++ is out of reach: it is OAA with a second net trained on the accumulated maps (integral
    attention), which is not here, nor in the paper's code, and a newer saliency model. --baseline
    is OAA without either.
  - So are its figures with ResNet38 (73.2 and 71.1) unless you have the weights in the names of
    nn/resnet38.py: they are an MXNet file, for which there is no converter here.

How the paper counts unknown pixels is not known: both readings are printed. Its saliency maps and
CRF settings are not published either; without `--saliency` the background is what the maps leave.
DeepLabV2 starts from ImageNet, not from a COCO segmentation model as some of the code that the
paper builds on: that would leak masks. Its BatchNorm trains on slots of two crops, where
DeepLabV2's usual setting freezes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rca_pipeline import AUGMENT, VGG16, RCAOptions, published

from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import BACKGROUND, Vocabulary
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import main
from memseg_dist.stages import Stage
from memseg_dist.tools.shipped import vocabulary


@dataclass(frozen=True)
class Options(RCAOptions):
    """RCA on PASCAL VOC 2012."""

    data: str = "shards/voc2012"
    """Folder that datasets/voc2012.py wrote."""
    net: Literal["vgg16", "resnet38"] = "vgg16"
    """The classifier's backbone; resnet38 needs --weights, and nothing here converts MXNet's."""
    weights: str | None = None
    """A .safetensors file of the backbone; by default the hub's, which has no resnet38."""


def stages(options: Options) -> dict[str, Stage]:
    method, backbone, weights = RCAConfig(), VGG16, options.weights or "hub"
    if options.net == "resnet38":
        if options.weights is None:
            raise ValueError(
                "--net resnet38 needs --weights FILE.safetensors: half of it is frozen and would "
                "stay random"
            )
        method = RCAConfig(reduce_to=512)  # memory and attention over 4,096 channels buy nothing
        backbone = BackboneConfig("resnet38", output_stride=8, drop_path=0.0,
                                  options={"frozen": "true"})  # fmt: skip
    source = Source("voc", f"{options.data}/train_aug", "labels", 4, 2, AUGMENT,
                    hide_mask=True, exclude=(BACKGROUND,))  # fmt: skip
    return published(
        options,
        source,
        f"{options.data}/val",
        num_images=10_582,
        name="voc",
        method=method,
        backbone=replace(backbone, pretrained=weights),
        segmenter_steps=20_000,
        truth=f"{options.data}/train",
    )


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return dict.fromkeys(("voc", "validation"), vocabulary("voc_21"))


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
