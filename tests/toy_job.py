"""A job of three stages, seconds each: train, export the backbone, train on from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from memseg_dist.config import EngineConfig, Intervals, LaunchConfig, LoaderConfig, TrackingConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.pipeline import PipelineOptions, main
from memseg_dist.stages import ExportConfig, Stage, result


@dataclass(frozen=True)
class Options(PipelineOptions):
    """A toy."""

    data: str = "data"
    """Folder of its shards."""
    launch: LaunchConfig = LaunchConfig("local")
    tracking: TrackingConfig = TrackingConfig("console")


def stages(options: Options) -> dict[str, Stage]:
    name = options.name or "toy"
    first = options.run(
        name,
        sources=(Source("toys", options.data, "labels", 1, 2, AugmentConfig(crop=32)),),
        method=ClassifyConfig(),
        backbone=BackboneConfig("test_vit", image_size=32, drop_path=0.0),
        steps=4,
        engine=EngineConfig("torch"),
        loader=LoaderConfig(processes=0),
        every=Intervals(log=1, checkpoint=2, poll=1),
    )
    weights = result("train") + "/weights/backbone.safetensors"
    start = replace(first.backbone, pretrained=result("export"))
    return {
        "train": first,
        "export": ExportConfig(result("train"), weights),
        "tune": replace(first, name=f"{name}_tuned", backbone=start),
    }


def vocabularies(options: Options) -> dict[str, Vocabulary]:
    return {"toys": Vocabulary(tuple(Category(f"toy:{n}", f"toy {n}") for n in range(4)))}


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
