"""What a config describes, built: the label space, and the method with fresh weights."""

from __future__ import annotations

import numpy as np
import torch

from memseg_dist.batch import derive_seed
from memseg_dist.config import EngineConfig, Relabelling, RunConfig
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.jsonable import decode, parse
from memseg_dist.methods.method import Method
from memseg_dist.methods.setup import Setup
from memseg_dist.nn.batchnorm import check_recorded


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
    relabel = {item.source: _read_relabelling(item) for item in config.relabel}
    return LabelSpace.union(vocabularies, relabel)


def _read_relabelling(item: Relabelling) -> dict[str, Category]:
    where = f"relabelling of source {item.source!r}"
    return decode(dict[str, Category], parse(item.classes, where), where)


def build_method(
    config: RunConfig,
    label_space: LabelSpace,
    device: torch.device | str = "cpu",
    *,
    for_training: bool = True,
) -> Method:
    """The method with fresh weights, a pure function of the seed, on `device`, whose kernels are
    set up for this process by `set_kernels`.

    for_training: with the memories that are kept while training; some are laid out by the indexes
    of the sources, which a model that only predicts does not need. ValueError for data or settings
    that the method cannot train with.
    """
    setup = _setup(config, label_space, device, for_training)
    set_kernels(config.engine.on(device), device)
    if for_training:
        config.method.check(setup)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        method = config.method.build(setup)
    check_recorded(method)
    return method.to(device)


def check_method(config: RunConfig, label_space: LabelSpace) -> None:
    """ValueError for what `build_method` refuses. The net is made on the CPU, without memories."""
    config.method.check(_setup(config, label_space, "cpu", for_training=True))
    build_method(config, label_space, for_training=False)


def _setup(
    config: RunConfig, label_space: LabelSpace, device: torch.device | str, for_training: bool
) -> Setup:
    engine = config.engine.on(device)
    return Setup(
        config.active_sources,
        label_space,
        config.backbone,
        scored=scored_classes(config, label_space),
        num_steps=config.steps,
        seed=config.seed,
        device=device,
        for_training=for_training,
        cache_dir=config.cache_directory if for_training else "",
        is_bf16=engine.precision == "bf16",
        channels_last=bool(engine.channels_last),
        compile=engine.compile,
        activation_checkpointing=engine.activation_checkpointing,
    )


def set_kernels(engine: EngineConfig, device: torch.device | str) -> None:
    """How fp32 products and convolutions are computed on CUDA from now on, in this process.

    engine: with everything decided (`EngineConfig.on`).
    """
    if torch.device(device).type == "cuda":
        # by the older of torch's two ways to say it, which 2.8 has too: mixing them is an error
        torch.backends.cuda.matmul.allow_tf32 = bool(engine.tf32)
        torch.backends.cudnn.allow_tf32 = bool(engine.tf32)
        torch.backends.cudnn.benchmark = bool(engine.cudnn_benchmark)


def scored_classes(config: RunConfig, label_space: LabelSpace) -> np.ndarray | None:
    """Label-space ids that the validation scores."""
    if config.validation is None:
        return None
    uids = np.array(label_space.vocabulary.uids, dtype=object)
    ids = label_space.classes(config.validation.name)
    return ids[~np.isin(uids[ids], config.validation.exclude)]
