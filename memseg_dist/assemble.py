"""What a config describes, built: the label space, and the method with fresh weights."""

from __future__ import annotations

import json

import numpy as np
import torch

from memseg_dist.batch import derive_seed
from memseg_dist.config import RunConfig
from memseg_dist.data.files import read_bytes
from memseg_dist.data.loader import Source
from memseg_dist.data.pairs import labelled_regions, steps_per_epoch
from memseg_dist.data.source import excluded_id
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.methods.classify import Classify, ClassifyConfig
from memseg_dist.methods.larvseg import LarvSeg
from memseg_dist.methods.method import Method
from memseg_dist.methods.rca import RCA, TrainingSet
from memseg_dist.methods.rca_config import RCAConfig
from memseg_dist.methods.segment import Segment, SegmentConfig
from memseg_dist.models.backbone import Backbone, build_backbone
from memseg_dist.models.cosine import CosineClassifier


def build_label_space(config: RunConfig) -> LabelSpace:
    """The union of the sources' vocabularies, then that of the validation set."""
    paths = {source.name: source.path for source in config.sources}
    if config.validation is not None:
        if config.validation.name in paths:
            raise ValueError(
                f"validation.name {config.validation.name!r} is the name of a source too; "
                "rename one of them"
            )
        paths[config.validation.name] = config.validation.path
    vocabularies = {
        name: Vocabulary.load(f"{path.rstrip('/')}/vocabulary.json") for name, path in paths.items()
    }
    relabel = {item.source: _read_relabelling(item.path) for item in config.relabel}
    return LabelSpace.union(vocabularies, relabel)


def _read_relabelling(path: str) -> dict[str, Category]:
    try:
        value = json.loads(read_bytes(path))
        return {
            uid: Category(new["uid"], new["name"], tuple(new.get("synonyms", ())))
            for uid, new in value.items()
        }
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"relabelling {path}: {error!r}; it must be a JSON object "
            '{local uid: {"uid": ..., "name": ..., "synonyms": [...]}}'
        ) from error


def build_method(
    config: RunConfig,
    label_space: LabelSpace,
    device: torch.device | str = "cpu",
    *,
    for_training: bool = True,
) -> Method:
    """The method with fresh weights, a pure function of the seed, on `device`.

    for_training: with the memories that are kept while training; some are laid out by the indexes
    of the sources, which a model that only predicts does not need.
    """
    kept = {source.name: _is_kept(source, label_space) for source in config.sources}
    classes = {name: label_space.classes(name)[mask] for name, mask in kept.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        backbone = build_backbone(config.backbone)
        if isinstance(config.method, ClassifyConfig):
            method: Method = Classify(
                backbone, config.method, num_classes=len(label_space), classes=classes
            )
        elif isinstance(config.method, SegmentConfig):
            method = Segment(
                backbone,
                config.method,
                num_classes=len(label_space),
                classes=classes,
                device=device,
            )
        elif isinstance(config.method, RCAConfig):
            method = RCA(
                backbone,
                config.method,
                classes=classes,
                num_classes=len(label_space),
                training=training_set(config, label_space) if for_training else None,
                seed=config.seed,
                device=device,
            )
        else:
            method = _larvseg(config, label_space, backbone, classes, kept, device)
    backbone.set_activation_checkpointing(config.engine.activation_checkpointing)
    return method.to(device)


def _larvseg(
    config: RunConfig,
    label_space: LabelSpace,
    backbone: Backbone,
    classes: dict[str, np.ndarray],
    kept: dict[str, np.ndarray],
    device: torch.device | str,
) -> LarvSeg:
    masked = [source.name for source in config.sources if source.supervision == "masks"]
    return LarvSeg(
        backbone,
        CosineClassifier(len(label_space), backbone.dim),  # type: ignore[arg-type]
        config.method,  # type: ignore[arg-type]
        classes=classes,
        multiplicity={name: label_space.multiplicity(name)[kept[name]] for name in masked},
        base_classes=sorted({int(index) for name in masked for index in classes[name]}),
        num_slots=config.num_slots,
        device=device,
    )


def training_set(config: RunConfig, label_space: LabelSpace) -> TrainingSet:
    """What RCA knows of its sources. ValueError for what it cannot learn from or be scored by."""
    for source in config.sources:
        if source.supervision != "labels":
            raise ValueError(
                f"source {source.name!r} has supervision {source.supervision!r}; RCA learns from "
                "image labels alone: use 'labels'"
            )
        if config.method.saliency_weight > 0 and source.saliency is None:  # type: ignore[union-attr]
            raise ValueError(
                f"source {source.name!r} has no saliency maps, which method.saliency_weight needs: "
                "set its `saliency` folder"
            )
    _check_scored(config, label_space)
    regions = labelled_regions(config.sources, label_space, config.cache_directory)
    if len(regions) == 0:
        names = [source.name for source in config.sources]
        raise ValueError(
            f"no image of the sources {names} has a label that takes part: RCA has nothing to "
            "learn from; check `exclude` and the recipe that wrote the shards"
        )
    epoch = steps_per_epoch(config.sources, config.cache_directory)
    return TrainingSet(regions, epoch, config.steps)


def _check_scored(config: RunConfig, label_space: LabelSpace) -> None:
    """ValueError for a validation class that no source labels: it would have no map."""
    if config.validation is None:
        return
    known = [label_space.classes(item.name)[_is_kept(item, label_space)] for item in config.sources]
    scored = label_space.classes(config.validation.name)
    uids = np.array(label_space.vocabulary.uids, dtype=object)
    missing = set(uids[np.setdiff1d(scored, np.concatenate(known))]) - set(
        config.validation.exclude
    )
    if missing:
        raise ValueError(
            f"the validation set {config.validation.path} has the classes {sorted(missing)[:8]}, "
            "which no source labels: they have no activation map. Add them to validation.exclude"
        )


def _is_kept(source: Source, label_space: LabelSpace) -> np.ndarray:
    """Which of the source's classes take part: an excluded one must not even be a negative."""
    excluded = [excluded_id(uid, source, label_space) for uid in source.exclude]
    return ~np.isin(label_space.classes(source.name), excluded)
