"""What every command shares: opening a checkpoint, and how pictures go through its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
from tyro.conf import arg

from memseg_dist.config import RunConfig, ValidationConfig, build_method
from memseg_dist.data.files import exists, join
from memseg_dist.data.vocabulary import LabelSpace, Vocabulary
from memseg_dist.evaluation.lookup import find_classes
from memseg_dist.evaluation.predict import Inference
from memseg_dist.methods.method import Method
from memseg_dist.train.checkpoint import MANIFEST, Checkpoint, latest
from memseg_dist.train.engine import load_weights


@dataclass(frozen=True)
class ModelOptions:
    """Which weights, and where to run them."""

    checkpoint: str
    """A run's directory, its checkpoints/ or one of them (.../step-00001000)."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default the GPU if there is one."""


@dataclass(frozen=True)
class InferenceOptions:
    """How a picture goes through the model; by default as in the validation of the run."""

    mode: Literal["whole", "slide"] | None = None
    """The whole picture at once, or sliding windows whose logits are averaged."""
    resize: tuple[int, int] | None = None
    """Longest and shortest side that the picture is fitted to, its ratio kept."""
    window: int | None = None
    """Side of a window in pixels."""
    stride: int | None = None
    """Step between windows in pixels."""
    memory: int = 512
    """MiB that upsampling the logits may take, at any number of classes."""

    def resolved(self, config: RunConfig) -> Inference:
        usual = config.validation or ValidationConfig(path="")
        if self.memory < 1:
            raise ValueError(f"--memory {self.memory}: must be 1 MiB or more")
        return Inference(
            mode=self.mode or usual.mode,
            resize=self.resize or usual.resize,
            window=self.window or usual.window,
            stride=self.stride or min(usual.stride, self.window or usual.window),
            memory_bytes=self.memory * 2**20,
        )


@dataclass(frozen=True)
class Model:
    """A checkpoint, opened."""

    method: Method
    config: RunConfig
    label_space: LabelSpace
    step: int
    device: torch.device


ModelFlags: TypeAlias = Annotated[ModelOptions, arg(name="")]
InferenceFlags: TypeAlias = Annotated[InferenceOptions, arg(name="")]


def open_model(options: ModelOptions, *, with_memories: bool = False) -> Model:
    """The method of a checkpoint with its weights, and its memories if asked for.

    ValueError naming the flag, or the damaged file.
    """
    device = _device(options.device)
    checkpoint = find_checkpoint(options.checkpoint)
    files = sorted(checkpoint.manifest["files"])
    unused = ("optimizer",) if with_memories else ("optimizer", "memory-")
    checkpoint.verify([name for name in files if not name.startswith(unused)])
    config, label_space = checkpoint.config, checkpoint.label_space
    backbone = dataclasses.replace(config.backbone, pretrained="")  # the checkpoint has them all
    method = build_method(dataclasses.replace(config, backbone=backbone), label_space, device)
    load_weights(method, checkpoint.weights())
    for name, memory in sorted(method.state().items()) if with_memories else ():
        memory.load_state_dict(checkpoint.reader(name))
    return Model(method, config, label_space, checkpoint.step, device)


def find_checkpoint(path: str) -> Checkpoint:
    """The checkpoint `path`, or the newest whole one of the run `path`."""
    if exists(join(path, MANIFEST)):
        return Checkpoint(path)
    found = latest(join(path, "checkpoints")) or latest(path)
    if found is None:
        raise ValueError(
            f"--checkpoint {path}: no whole checkpoint there; give a run's directory or one of its "
            "checkpoints/step-*"
        )
    return Checkpoint(found)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}; use cpu or cuda") from error
    return device


def chosen_classes(vocabulary: Vocabulary, wanted: str | None, flag: str) -> Sequence[int]:
    """The ids of a comma-separated list of classes, or all of them. ValueError names the flag."""
    if wanted is None:
        return range(len(vocabulary))
    try:
        return find_classes(vocabulary, wanted.split(","))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
