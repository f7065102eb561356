"""What every layer agrees on: a batch of one data source, and the clock that says whose turn it is.

Shape letters: B images of one slot, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -1
"""Class id of a pixel that no loss and no metric counts."""

_ALIGNMENT = 16
"""Bytes; of every array in a packed copy."""

Supervision = Literal["masks", "labels", "none"]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`: the same on every machine and Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def onto_device(device: torch.device | str, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Host arrays on the device, by one copy for all of them, from pinned memory to a GPU: the host
    does not wait. They share their memory there, so change none in place.
    """
    device = torch.device(device)
    parts = [torch.from_numpy(array).contiguous() for array in arrays]
    if device.type == "cpu":
        return tuple(parts)
    starts = np.cumsum([0, *(-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts)])
    packed = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = [slice(int(start), int(start) + part.nbytes) for start, part in zip(starts, parts)]
    for place, part in zip(places, parts):
        packed[place] = part.flatten().view(torch.uint8)
    there = packed.to(device, non_blocking=True)
    return tuple(
        there[place].view(part.dtype).view(part.shape) for place, part in zip(places, parts)
    )


class CropBox(NamedTuple):
    """Where the valid part of a crop lies in its stored image.

    left, top, width, height: in units of the stored image's sides, 0..1. flipped: mirrored left to
    right. rows, columns: the valid part is the crop's top left [rows, columns] pixels, padding is
    right and below; 0 for a sample that was skipped, whose box is all zeros.

    The centre of the crop's pixel (y, x), y < rows and x < columns, shows the point at
    top + height * (y + 0.5) / rows down and left + width * (x + 0.5) / columns across
    ((columns - 0.5 - x) / columns if flipped).
    """

    left: float
    top: float
    width: float
    height: float
    flipped: bool
    rows: int
    columns: int


UNREADABLE = CropBox(0.0, 0.0, 0.0, 0.0, False, 0, 0)
"""The crop box of a sample that could not be read."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One slot's samples; all from one data source, all of one size.

    images: uint8 [B, 3, H, W], RGB; padding is 0.
    valid: bool [B, H, W], False on padding (and on the whole of a sample that was skipped).
    masks: int64 [B, H, W] of label-space class ids, IGNORE where unknown; None without masks. They
        come from the loader as int32, half the bytes, and are int64 after `to`.
    labels: per image its label-space class ids, ascending; () where there are none. They stay on
        the host, so sizes that depend on them never cost a device synchronisation.
    skipped: how many of the B samples could not be read and were blanked (counted, reported).
    crop_boxes: per image where its crop lies in the stored image; () if whoever made the batch does
        not say, or turns crops (`AugmentConfig.rotate`): a box cannot say where a turned one lies.
    saliency: float32 [B, H, W] in 0..1, -1 on padding; None without `Source.saliency`.
    pseudo_masks: as `masks`, of the same pixels; None without `Source.pseudo_masks`.
    """

    images: Tensor
    valid: Tensor
    masks: Tensor | None
    labels: tuple[tuple[int, ...], ...]
    source: str
    supervision: Supervision
    keys: tuple[str, ...]
    skipped: int = 0
    crop_boxes: tuple[CropBox, ...] = ()
    saliency: Tensor | None = None
    pseudo_masks: Tensor | None = None

    def __post_init__(self) -> None:
        """ValueError for a label that an image has twice: it would be its own negative."""
        for image, labels in enumerate(self.labels):
            if len(set(labels)) < len(labels):
                raise ValueError(
                    f"image {image} of a batch of {self.source!r} has the labels {labels}: give "
                    "each once"
                )

    def to(self, device: torch.device | str) -> Batch:
        """On the device, with masks as int64: what losses and indexing want."""
        there = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        masks, pseudo_masks = (
            None if ids is None else ids.long() for ids in (there.masks, there.pseudo_masks)
        )
        return dataclasses.replace(there, masks=masks, pseudo_masks=pseudo_masks)

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> Batch:
        tensors = {
            field.name: function(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True, slots=True)
class Clock:
    """Where in the run a forward pass stands. Never a rank: W workers share the S slots.

    step: optimizer steps done before this one, from 0.
    slot: 0 .. num_slots - 1 within the step.
    idle: True when a worker with fewer slots repeats one to keep the collectives in step; its loss
        has weight 0 and what it proposes to a bank is dropped.
    num_steps: steps of the run; 0 where unknown.
    """

    step: int
    slot: int = 0
    num_slots: int = 1
    idle: bool = False
    seed: int = 0
    num_steps: int = 0

    def seed_forward(self) -> None:
        """Dropout and drop-path of a forward pass: drawn by slot, not by worker."""
        torch.manual_seed(self.seed_for("forward"))

    def seed_for(self, purpose: str) -> int:
        return derive_seed(self.seed, purpose, self.step, self.slot)
