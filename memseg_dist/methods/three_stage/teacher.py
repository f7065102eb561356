"""The mean teacher f' (Tarvainen & Valpola 2017): a moving average of the student.

    theta' <- decay theta' + (1 - decay) theta          once per step, BatchNorm's statistics too

It is no module of the method: no engine casts or replicates it, no optimizer sees it. Every rank
keeps the whole of it, and moves it by the same weights.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from memseg_dist.batch import Clock
from memseg_dist.memory.state import Reader, Rows
from memseg_dist.nn.backbone import Backbone
from memseg_dist.nn.deeplab import DeepLabV2Head

if TYPE_CHECKING:
    from memseg_dist.methods.three_stage.config import ThreeStageConfig


class Segmenter(Protocol):
    """f, or its teacher."""

    backbone: Backbone
    head: DeepLabV2Head


class Teacher:
    """Starts as a copy of the student; in evaluation mode, without gradients, in fp32."""

    def __init__(self, student: Segmenter, device: torch.device | str) -> None:
        self.backbone = copy.deepcopy(student.backbone).eval().requires_grad_(False).to(device)
        self.head = copy.deepcopy(student.head).eval().requires_grad_(False).to(device)
        self.backbone.set_activation_checkpointing(False)

    @torch.no_grad()
    def follow(self, student: Segmenter, decay: float) -> None:
        """Take over 1 - decay of the student."""
        mine, others = averaged(self), averaged(student)
        assert mine.keys() == others.keys()
        get_ema_multi_avg_fn(decay)([*mine.values()], [*others.values()], 0)

    def state_dict(self) -> dict[str, Rows | Tensor]:
        return {**averaged(self)}

    @torch.no_grad()
    def load_state_dict(self, read: Reader) -> None:
        for name, tensor in averaged(self).items():
            tensor.copy_(read(name))


def averaged(segmenter: Segmenter) -> dict[str, Tensor]:
    """What a teacher averages: parameters and buffers, but for counters."""
    parts = {"backbone": segmenter.backbone, "head": segmenter.head}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }


def decay_at(clock: Clock, config: ThreeStageConfig) -> float:
    """decays[i] up to the share decay_until[i] of the run, the last one to its end."""
    share = clock.step / clock.num_steps if clock.num_steps else 0.0
    return config.decays[bisect_right(config.decay_until, share)]
