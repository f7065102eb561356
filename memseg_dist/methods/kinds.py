"""The table of methods: which settings a `kind` in a config stands for."""

from __future__ import annotations

from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.methods.method import MethodConfig
from memseg_dist.methods.pseudoseg.config import PseudoSegConfig
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.methods.three_stage.config import ThreeStageConfig


def register(config: type[MethodConfig]) -> type[MethodConfig]:
    """Make a method known by its `kind`. ValueError for a kind that another method has."""
    kind = config.kind  # type: ignore[misc]
    if MethodConfig.kinds.setdefault(kind, config) is not config:
        raise ValueError(f"method kind {kind!r} is taken by {MethodConfig.kinds[kind].__name__}")
    return config


for _config in (
    LarvSegConfig,
    RCAConfig,
    MCIBIConfig,
    PseudoSegConfig,
    ThreeStageConfig,
    SegmentConfig,
    ClassifyConfig,
):
    register(_config)
