"""A checkpoint opened for use: the method with its weights, on a device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from memseg_dist.assemble import build_method
from memseg_dist.config import RunConfig
from memseg_dist.data.files import exists, join
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.methods.method import Method
from memseg_dist.train.checkpoint import MANIFEST, Checkpoint, latest
from memseg_dist.train.engine import load_weights


@dataclass(frozen=True)
class Model:
    """A checkpoint, opened."""

    method: Method
    config: RunConfig
    label_space: LabelSpace
    step: int
    device: torch.device


def find_checkpoint(path: str) -> Checkpoint:
    """The checkpoint `path`, or the newest whole one of the run `path`."""
    found = _find(path)
    if found is None:
        raise ValueError(
            f"--checkpoint {path}: no whole checkpoint there; give a run's directory or one of its "
            "checkpoints/step-*"
        )
    return Checkpoint(found)


def has_checkpoint(path: str) -> bool:
    """Whether `find_checkpoint` finds one."""
    return _find(path) is not None


def _find(path: str) -> str | None:
    if exists(join(path, MANIFEST)):
        return path
    return latest(join(path, "checkpoints")) or latest(path)


def load_model(checkpoint: Checkpoint, device: torch.device, with_memories: bool = False) -> Model:
    """The method with its weights and what it predicts with; with its memories if asked for.

    Of the checkpoint's memories those are read that the method, built for use or for training, has
    in its state: a teacher is part of a model that only predicts, a bank is not.
    ValueError naming the damaged file.
    """
    files = sorted(checkpoint.manifest.files)
    checkpoint.verify([name for name in files if not name.startswith(("optimizer", "memory-"))])
    config, label_space = checkpoint.config, checkpoint.label_space
    backbone = dataclasses.replace(config.backbone, pretrained="")  # the checkpoint has them all
    config_here = dataclasses.replace(config, backbone=backbone)
    method = build_method(config_here, label_space, device, for_training=with_memories)
    with checkpoint.naming():
        load_weights(method, checkpoint.weights())
        for name, memory in sorted(method.state().items()):
            checkpoint.verify(checkpoint.files_of(name))
            memory.load_state_dict(checkpoint.reader(name))
    return Model(method, config, label_space, checkpoint.step, device)


def chosen_device(name: str | None) -> torch.device:
    """The device `name`; None: the GPU if there is one. ValueError naming the flag."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}; use cpu or cuda") from error
    return device
