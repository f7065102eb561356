"""The contract of a labeller: a model and an image in, a mask with unknown pixels out.

    find = labeller.open(model)                # once per process
    mask, background, note, maps = find(Picture("2007_000032", image, classes=(3, 7)))

A labeller is a frozen dataclass of its options; the label stage (`tools.pseudo_labels`) writes
shards with any of them. `ArgmaxLabeller` needs nothing but a method's `predict`.

Shape letters: H x W pixels of the stored image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.checks import Share, check_numbers
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.memory.state import Reader
from memseg_dist.methods.method import Method


class Picture(NamedTuple):
    """image: uint8 [3, H, W]. classes: its label-space ids, ascending; () if it has no labels."""

    key: str
    image: Tensor
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """What a labeller found in one picture.

    mask: int [H, W] of label-space ids, IGNORE where unknown. background: the id in `mask` that
    stands for the labeller's background, if it has one.
    note: figures of this picture, which the report adds up; pixels under a name "unknown_RULE" are
    reported as a share of all. maps: what to show beside it, [h, w] in 0..1 by title.
    """

    mask: NDArray[np.integer]
    background: int | None = None
    note: Mapping[str, int] = field(default_factory=dict)
    maps: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)


class LabellingModel(Protocol):
    """A checkpoint as a labeller sees it; what is costly is opened when it is first asked for.

    path: the checkpoint, for messages. trained: label-space ids that some source supervised,
    ascending.
    """

    path: str
    label_space: LabelSpace
    trained: NDArray[np.int64]

    @property
    def method(self) -> Method:
        """With its weights, on the device that was asked for."""
        ...

    def memory(self, name: str) -> Reader:
        """The rows of a memory, read when they are asked for."""
        ...

    def check_memory(self, name: str) -> bool:
        """Whether the checkpoint holds the memory; ValueError if its files are damaged."""
        ...

    def fitted(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] at the size that the run's validation looks at."""
        ...

    def segment(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """As the run's validation looks at images: per pixel of uint8 [3, H, W] the index into
        `classes` of the largest logit, int64 [H, W], and its softmax probability, float32 [H, W].
        """
        ...


Label: TypeAlias = Callable[[Picture], Labelled]


@dataclass(frozen=True)
class LabellerConfig:
    """Base of every labeller's options; `kind` tells them apart."""

    kind: str
    """Name of the labeller; it says which other options there are."""

    def open(self, model: LabellingModel) -> Label:
        """The function that labels pictures; called once per process."""
        raise NotImplementedError

    def check_data(self, key: str) -> None:
        """ValueError for data, whose first sample is `key`, that cannot be labelled; called before
        there need be a model.
        """

    def check(self, model: LabellingModel) -> None:
        """ValueError for what cannot work with this model; before any picture is labelled."""

    def classes(self, trained: NDArray[np.int64], of_data: NDArray[np.int64]) -> NDArray[np.int64]:
        """Label-space ids that masks may hold, ascending, beside the background. of_data: those of
        the vocabulary of the images.
        """
        return trained

    @property
    def background_uid(self) -> str | None:
        """Uid of the class that everything else belongs to, if the labeller has one."""
        return None

    @property
    def runs_network(self) -> bool:
        """Whether it looks at images with the network, so that a GPU is worth having."""
        return True


@dataclass(frozen=True)
class ArgmaxLabeller(LabellerConfig):
    """A teacher's hard pseudo labels: the most probable class, where it is probable enough."""

    kind: Literal["argmax"] = "argmax"
    threshold: Share = 0.5
    """Unknown: pixels whose largest probability is below this."""
    restrict_to_labels: bool = True
    """Only the image's own classes compete, where it has labels; else all trained classes do."""

    def __post_init__(self) -> None:
        check_numbers(self, "labeller.")

    def open(self, model: LabellingModel) -> Label:
        def label(picture: Picture) -> Labelled:
            restrict = self.restrict_to_labels and len(picture.classes) > 0
            ids = np.array(picture.classes if restrict else model.trained, dtype=np.int64)
            index, confidence = model.segment(picture.image, torch.from_numpy(ids))
            is_unknown = (confidence < self.threshold).cpu().numpy()
            mask = np.where(is_unknown, IGNORE, ids[index.cpu().numpy()])
            return Labelled(mask, note={"unknown_low_confidence": int(is_unknown.sum())})

        return label
