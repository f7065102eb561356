"""The contract of a method: a batch in, named losses out.

A method knows no rank, optimizer, logger or cluster. It may read the memories that it was given,
propose rows to them in `forward` and commit them in `after_step`; that is all it knows of the world
around it. A memory's read may be a collective, so whether a method reaches it may depend on the
clock, never on what the batch holds.

A method is described by a `MethodConfig`, which builds it from what a run knows (`methods.setup`).
`methods.kinds` is the table of the kinds there are.

Shape letters: B images, H x W pixels, h x w positions of the feature map, D channels, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.batch import Batch, Clock
from memseg_dist.memory.state import Stateful

if TYPE_CHECKING:
    from memseg_dist.memory.rows import ShardedRows
    from memseg_dist.methods.setup import Setup
    from memseg_dist.nn.backbone import Backbone


@dataclass(frozen=True)
class MethodConfig:
    """Base of the settings of every method: frozen dataclasses that are told apart by `kind`."""

    kinds: ClassVar[dict[str, type[MethodConfig]]] = {}
    """The table by which JSON finds the class of a `kind`; see `methods.kinds.register`."""
    kind: str
    """Name of the method; the job chooses it."""
    labels_name_all: ClassVar[bool] = False
    """Whether image labels are taken to name whatever is large in the image."""

    def build(self, setup: Setup) -> Method:
        """The method with fresh weights, drawn from torch's global generator."""
        raise NotImplementedError

    def check(self, setup: Setup) -> None:
        """Before the first step: ValueError for data or settings that this method cannot train
        with.
        """

    def smoke(self) -> Self:
        """The same settings for a run of four steps on eight images."""
        return self


PER_CLASS = "per class"
"""How the name of a chart ends that has a figure for each id of the label space."""
MATMUL_CLASSES = 256
"""Classes per matrix product of `LinearLogits.chunk`. Always this many (padded), whatever is asked
for: a product of another shape may round otherwise, and then equal classes would not tie."""


class Prediction(Protocol):
    """Low-resolution logits of K classes for B images, a few classes at a time."""

    @property
    def num_classes(self) -> int: ...

    @property
    def stride(self) -> int:
        """Pixels per position, the last row and column of them perhaps beyond the image."""
        ...

    def chunk(self, start: int, stop: int) -> Tensor:
        """Logits of the classes [start, stop): float32 [B, stop - start, h, w]."""
        ...

    def dense(self) -> Tensor:
        """All of them: [B, K, h, w], differentiable."""
        ...

    def of(self, image: int) -> Prediction:
        """That of one of the images alone."""
        ...


@dataclass(frozen=True)
class LinearLogits:
    """Logits that are linear in a feature map, whatever the size of the vocabulary.

    features: [B, D, h, w]; weight: [K, D]; bias: [K] or None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int = field(kw_only=True)

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    def chunk(self, start: int, stop: int) -> Tensor:
        missing = -(stop - start) % MATMUL_CLASSES
        with torch.autocast(self.features.device.type, enabled=False):
            weight = F.pad(self.weight[start:stop].float(), (0, 0, 0, missing))
            maps = [weight @ features for features in self.features.float().flatten(2)]
        logits = torch.stack(maps)
        if self.bias is not None:
            logits += F.pad(self.bias[start:stop].float(), (0, missing))[:, None]
        return logits[:, : stop - start].unflatten(2, self.features.shape[-2:])

    def dense(self) -> Tensor:
        with torch.autocast(self.features.device.type, enabled=False):
            logits = torch.einsum("bdhw,kd->bkhw", self.features, self.weight)
        return logits if self.bias is None else logits + self.bias[:, None, None]

    def of(self, image: int) -> LinearLogits:
        return replace(self, features=self.features[image : image + 1])


@dataclass(frozen=True)
class DenseLogits:
    """Logits as a head of few classes makes them: [B, K, h, w]."""

    logits: Tensor
    stride: int

    @property
    def num_classes(self) -> int:
        return self.logits.shape[1]

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.logits[:, start:stop].float()

    def dense(self) -> Tensor:
        return self.logits

    def of(self, image: int) -> DenseLogits:
        return replace(self, logits=self.logits[image : image + 1])


_IN_FP32 = ("forward", "before_step", "predict", "activations", "embed", "maps", "label_sources")


class Method(nn.Module):
    """Base of every method. Subclasses implement `forward` and `predict`.

    `forward`, `before_step` and what is asked of the trained method run in fp32, whatever autocast
    surrounds them: the backbone turns bf16 on for itself alone, so a score does not depend on who
    asks.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in _IN_FP32:
            if name in vars(cls):
                setattr(cls, name, _without_autocast(vars(cls)[name]))

    # ---------------------------------------------------------------- training

    def before_step(self, slots: Sequence[tuple[Batch, Clock]], clock: Clock) -> None:
        """Once per optimizer step, on every rank, before the losses of its slots.

        slots: this rank's micro-batches on the device, idle ones included. What all slots of a step
        share is computed here once; forwards in it move no running statistics.
        """

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Weighted scalar losses of one slot, by name; the loss of the slot is their sum."""
        raise NotImplementedError

    def after_step(self, clock: Clock) -> None:
        """Once per optimizer step, on every rank: commit memories, move teachers."""

    def parameter_groups(self) -> Mapping[str, Sequence[nn.Module]]:
        """Modules by the name of their learning-rate group; all other parameters are "heads"."""
        backbone = getattr(self, "backbone", None)
        return {} if backbone is None else {"backbone": [backbone]}

    def state(self) -> Mapping[str, Stateful]:
        """What is to be checkpointed beside the weights, by name; of a method that was built to
        predict alone, what it needs for that.
        """
        return {}

    # ---------------------------------------------------------------- use

    @property
    def stride(self) -> int:
        """Pixels per position of all maps that the method gives below; they begin at the image's
        top left, and the last ones end with or beyond it.
        """
        return cast("Backbone", self.backbone).stride

    def predict(self, images: Tensor, classes: Tensor) -> Prediction:
        """Logits of the label-space ids `classes` [K] for uint8 images [B, 3, H, W]."""
        raise NotImplementedError

    def activations(self, images: Tensor, classes: Tensor) -> Tensor:
        """Class activation maps [B, K, h, w] of 0 or more, of what `predict` is asked for:
        relu(logits), but for a method whose loss reads its logits otherwise.
        """
        return self.predict(images, classes).dense().relu()

    def embed(self, images: Tensor) -> Tensor:
        """Unit-norm pixel embeddings [B, D, h, w] of uint8 images [B, 3, H, W]."""
        raise NotImplementedError

    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """Pictures-to-be by name, [B, h, w] in 0..1: image b looked at for class classes[b]."""
        return {}

    def label_sources(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """What a method of pseudo labels makes them from, by name: probabilities [B, K, h, w] of
        the label-space ids `classes` [K] for uint8 images [B, 3, H, W]. Asked for when the run is
        evaluated: how well each source is calibrated.
        """
        return {}

    # ---------------------------------------------------------------- figures

    def summary(self, clock: Clock) -> dict[str, float]:
        """Figures worth a plot (bank fill, coverage, staleness), asked for at log time."""
        return {}

    def charts(self) -> dict[str, Tensor]:
        """Lists of figures worth a bar chart, by name: float [n] on the host. Collective.

        Asked for when the run is evaluated ("memory/rows per class"). A name that ends in PER_CLASS
        promises one figure for each id of the label space.
        """
        return {}

    def class_vectors(self) -> tuple[Tensor, Tensor] | None:
        """What stands for the classes in the space of `embed`. Collective.

        Label-space ids int64 [n], ascending, and vectors float [n, D], both on the host: none for a
        class that has no vector yet, several for one with several. Of any length: they are compared
        by cosine. Asked for when the run is evaluated. None: the method has no such vectors.
        """
        return None


def memory_figures(memories: Mapping[str, ShardedRows], step: int) -> dict[str, float]:
    """What each memory says of itself, as "memory/fill". Collective; waits for the device."""
    return {
        f"{name}/{figure}": value
        for name, memory in memories.items()
        for figure, value in memory.summary(step).items()
    }


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(self: Method, *arguments: Any, **keywords: Any) -> Any:
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return function(self, *arguments, **keywords)

    return guarded


@contextmanager
def evaluation_mode(method: nn.Module) -> Iterator[None]:
    """No gradients and every module in eval mode; each module's own mode is restored after.

    cuDNN's algorithms are not tried out: pictures to predict come in many sizes, each but once.
    """
    training = [(module, module.training) for module in method.modules()]
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    method.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for module, mode in training:
            module.training = mode
