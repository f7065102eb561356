"""A checkpoint as labellers see it (`methods.labeller.LabellingModel`)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.config import ValidationConfig
from memseg_dist.data.augment import fitted_size, resize_image
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.evaluation.sliding import Inference, segment_confident
from memseg_dist.memory.state import Reader
from memseg_dist.methods.method import Method, evaluation_mode
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.load_model import chosen_device, load_model


class CheckpointModel:
    """Weights are read when the method is first asked for: accumulated maps need none."""

    def __init__(self, checkpoint: Checkpoint, device: str | None) -> None:
        self.checkpoint = checkpoint
        self._device = device

    @property
    def path(self) -> str:
        return self.checkpoint.path

    @property
    def label_space(self) -> LabelSpace:
        return self.checkpoint.label_space

    @cached_property
    def trained(self) -> NDArray[np.int64]:
        space, trained = self.label_space, set[int]()
        for source in self.checkpoint.config.sources:
            if source.supervision != "none":
                ids = space.classes(source.name).tolist()
                trained |= {i for i in ids if space.vocabulary.uids[i] not in source.exclude}
        return np.array(sorted(trained - {IGNORE}), dtype=np.int64)

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
        files = [file for file in manifest["files"] if file.startswith(f"memory-{name}-")]
        self.checkpoint.verify(files)
        return name in manifest["memories"]

    def segment(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        usual = self.checkpoint.config.validation or ValidationConfig(path="")
        inference = Inference(usual.mode, usual.resize, usual.window, usual.stride)
        height, width = image.shape[-2:]
        small = resize_image(image, fitted_size(height, width, inference.resize)).to(self.device)
        ids = classes.to(self.device)
        with evaluation_mode(self.method):
            return segment_confident(self.method.predict, small, ids, inference, (height, width))
