"""A run's backbone as a file that other runs start from."""

from __future__ import annotations

from dataclasses import replace

from memseg_dist.data.files import make_parent, temporary_beside
from memseg_dist.nn.backbone import build_backbone, save_backbone
from memseg_dist.stages import ExportConfig
from memseg_dist.train.load_model import find_checkpoint


def export_backbone(config: ExportConfig) -> None:
    """Write the backbone of the newest checkpoint, whole or not at all; an older file is replaced.

    ValueError if there is no checkpoint, or a damaged one.
    """
    checkpoint = find_checkpoint(config.checkpoint)
    backbone = build_backbone(replace(checkpoint.config.backbone, pretrained=""))
    prefix = "backbone."
    checkpoint.verify(["model.safetensors"])
    weights = checkpoint.weights().items()
    backbone.load_state_dict(
        {name.removeprefix(prefix): part for name, part in weights if name.startswith(prefix)}
    )
    out = make_parent(config.out)
    unfinished = temporary_beside(out)
    save_backbone(backbone, unfinished)
    unfinished.replace(out)
