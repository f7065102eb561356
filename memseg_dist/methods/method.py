"""The contract of a method: a batch in, named losses out.

A method knows no rank, collective, optimizer, logger or data set. It may read the banks that it was
given, propose rows to them in `forward` and commit them in `after_step`; that is all it knows of
the world around it. A bank's read may be a collective, so whether `forward` reaches it may depend
on the clock, never on what the batch holds.

Shape letters: B images, H x W pixels, h x w positions of the feature map, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memseg_dist.batch import Batch, Clock
from memseg_dist.memory.rows import Stateful


@dataclass(frozen=True)
class LinearLogits:
    """Logits that are linear in a feature map: they can be enlarged a few classes at a time.

    features: [B, D, h, w]; weight: [K, D]; bias: [K] or None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def chunk(self, start: int, stop: int) -> Tensor:
        """Low-resolution logits of classes [start, stop): [B, stop - start, h, w]."""
        logits = torch.einsum("bdhw,kd->bkhw", self.features, self.weight[start:stop])
        return logits if self.bias is None else logits + self.bias[start:stop, None, None]

    def dense(self) -> Tensor:
        return self.chunk(0, self.weight.shape[0])


class Method(nn.Module):
    """Base of every method. Subclasses implement `forward` and `predict`."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Weighted scalar losses of one slot, by name; the loss of the slot is their sum."""
        raise NotImplementedError

    def previews(self, clock: Clock) -> bool:
        """Whether this step wants `preview` of all its slots before their losses: a function of
        the clock alone, the same on every rank.
        """
        return False

    def preview(self, batch: Batch, clock: Clock) -> None:
        """A first look at a slot, without gradient, under the random numbers of its `forward`."""
        raise NotImplementedError

    def exchange(self, clock: Clock) -> None:
        """Once after the previews, on every rank: tell the others what was seen."""
        raise NotImplementedError

    def predict(self, images: Tensor, classes: Tensor) -> LinearLogits:
        """Logits of the label-space ids `classes` [K] for uint8 images [B, 3, H, W]."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Unit-norm pixel embeddings [B, D, h, w] of uint8 images [B, 3, H, W]."""
        raise NotImplementedError

    def maps(self, images: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
        """Pictures-to-be by name, [B, h, w] in 0..1: image b looked at for class classes[b]."""
        return {}

    def after_step(self, clock: Clock) -> None:
        """Once per optimizer step, on every rank: commit banks, move teachers."""

    def state(self) -> dict[str, Stateful]:
        """What is to be checkpointed beside the weights, by name."""
        return {}

    def summary(self, clock: Clock) -> dict[str, float]:
        """Figures worth a plot (bank fill, coverage, staleness), asked for at log time."""
        return {}

    def charts(self) -> dict[str, Tensor]:
        """Lists of figures worth a bar chart, by name: float [n] on the host. Collective.

        Asked for when the run is evaluated ("memory/rows per class").
        """
        return {}
