"""Pseudo masks for sources that name some: what the colours of the crops say, partly wrong.

Importing this module gives them to every `SourceReader`, in a worker too.
"""

from __future__ import annotations

import dataclasses

import torch
from train.shards import COLORS

from memseg_dist.batch import IGNORE, Batch
from memseg_dist.data.source import SourceReader

_batch = SourceReader.batch


def with_pseudo_masks(reader: SourceReader, draws) -> Batch:
    batch = _batch(reader, draws)
    if reader.source.pseudo_masks is None:
        return batch
    return dataclasses.replace(batch, pseudo_masks=pseudo_masks_of(batch))


def pseudo_masks_of(batch: Batch) -> torch.Tensor:
    colors = torch.from_numpy(COLORS)[:, None, :, None, None]
    nearest = (batch.images - colors).square().sum(dim=2).argmin(dim=0)
    nearest[:, :3] = 1  # as if the network did not know the top of a picture
    nearest[:, -2:] = IGNORE
    return nearest.masked_fill(~batch.valid, IGNORE)


SourceReader.batch = with_pseudo_masks
