"""What the runs with LarvSeg's published settings share: ViT-B/16, scores on ADE20K."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal

from memseg_dist.config import Intervals, LaunchConfig, Relabelling, RunConfig, ValidationConfig
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.nn.backbone import BackboneConfig
from memseg_dist.tools.shipped import recipe

Protocol = Literal["wordnet", "table3", "head", "normalised"]
"""Which classes are one, and which are novel: see `datasets/larvseg_splits.py`."""
Kind = Literal["larvseg", "baseline", "segmenter"]
"""The paper's method; without memory and L_aux; and without image labels (Table 1)."""


def larvseg_run(
    name: str,
    sources: tuple[Source, ...],
    vocabularies: Mapping[str, Vocabulary],
    validation: str,
    *,
    protocol: Protocol,
    kind: Kind,
    cls_weight: float,
    distance_threshold: float,
    steps: int,
    every: Intervals,
) -> RunConfig:
    """A run on the masks of COCO-Stuff and the labels of the others.

    validation: shards with the vocabulary "ade". protocol: see `Protocol`.
    """
    classes = recipe("larvseg_splits").split(
        protocol, vocabularies, masks=["coco_stuff"], test="ade"
    )
    return RunConfig(
        name=f"{kind}_{name}",
        storage="runs",
        sources=sources,
        method=LarvSegConfig(
            attention="cross_image" if kind == "larvseg" else "off",
            cls_weight=cls_weight,
            aux_weight=0.1,
            distance_threshold=distance_threshold,
        ),
        backbone=BackboneConfig(
            "vit_base_patch16_384.augreg_in21k_ft_in1k", pretrained="hub", image_size=512
        ),
        validation=ValidationConfig(
            validation,
            name="ade",
            base=tuple(sorted(classes.base)),
            novel=tuple(sorted(classes.novel)),
        ),
        steps=steps,
        launch=LaunchConfig(workers=(1, 8)),
        every=every,
        relabel=tuple(
            Relabelling(source, _compact(changes))
            for source, changes in classes.relabel.items()
            if changes
        ),
    )


def _compact(changes: Mapping[str, Category]) -> str:
    classes = {uid: asdict(category) for uid, category in changes.items()}
    return json.dumps(classes, separators=(",", ":"))
