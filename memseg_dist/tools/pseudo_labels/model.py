"""A checkpoint as labellers see it (`methods.labeller.LabellingModel`)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from memseg_dist.config import ValidationConfig
from memseg_dist.data.source import supervised_ids
from memseg_dist.evaluation.sliding import Inference, segment_confident
from memseg_dist.memory.state import Reader
from memseg_dist.methods.method import Method, evaluation_mode
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.load_model import chosen_device, load_model


class CheckpointModel:
    """Weights are read when the method is first asked for: accumulated maps need none."""

    def __init__(self, checkpoint: Checkpoint, device: str | None) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.label_space, sources = checkpoint.label_space, checkpoint.config.active_sources
        self.trained = supervised_ids(sources, self.label_space, "masks", "labels")
        self._device = device

    @cached_property
    def device(self) -> torch.device:
        return chosen_device(self._device)

    @cached_property
    def method(self) -> Method:
        return load_model(self.checkpoint, self.device).method

    def memory(self, name: str) -> Reader:
        return self.checkpoint.reader(name)

    def check_memory(self, name: str) -> bool:
        manifest = self.checkpoint.manifest
        files = [file for file in manifest.files if file.startswith(f"memory-{name}-")]
        self.checkpoint.verify(files)
        return name in manifest.memories

    @cached_property
    def inference(self) -> Inference:
        """As the run's validation looks at images."""
        usual = self.checkpoint.config.validation or ValidationConfig(path="")
        return Inference.of(usual, self.label_space.vocabulary)

    def fitted(self, image: Tensor) -> Tensor:
        return self.inference.fitted(image)

    def segment(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        size, ids = (image.shape[-2], image.shape[-1]), classes.to(self.device)
        small = self.fitted(image).to(self.device)
        with evaluation_mode(self.method):
            return segment_confident(self.method.predict, small, ids, self.inference, size)
