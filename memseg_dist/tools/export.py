"""A run's backbone as a file that other runs start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from memseg_dist.nn.backbone import build_backbone, save_backbone
from memseg_dist.stages import ExportConfig
from memseg_dist.train.load_model import find_checkpoint


def export_backbone(config: ExportConfig) -> None:
    """Write the backbone of the newest checkpoint, whole or not at all; an older file is replaced.

    ValueError if there is no checkpoint.
    """
    checkpoint = find_checkpoint(config.checkpoint)
    backbone = build_backbone(replace(checkpoint.config.backbone, pretrained=""))
    prefix = "backbone."
    weights = checkpoint.weights().items()
    backbone.load_state_dict(
        {name.removeprefix(prefix): part for name, part in weights if name.startswith(prefix)}
    )
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".tmp")
    save_backbone(backbone, unfinished)
    unfinished.replace(out)
