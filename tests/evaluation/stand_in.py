"""A method and a validation set small enough to check by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.evaluation.metrics import EvaluatedClass
from memseg_dist.methods.method import LinearLogits, Method

NUM_CLASSES = 6
FIRST_ID = 3
"""Label-space id of the first evaluated class, so that ids and positions differ."""


class ColorMethod(Method):
    """Classes are directions in colour; features are colours of 4 x 4 cells."""

    stride = 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(FIRST_ID + NUM_CLASSES, 8, generator=generator)
        self.table = torch.nn.Parameter(table)
        self.norm = torch.nn.BatchNorm2d(8)
        self.projection = torch.randn(3, 8, generator=generator)

    def embed(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(images / 255 - 0.5, (0, -width % 4, 0, -height % 4))
        cells = F.avg_pool2d(padded, 4)
        features = torch.einsum("bchw,cd->bdhw", cells, self.projection)
        return F.normalize(self.norm(features), dim=1)

    def predict(self, images: Tensor, classes: Tensor) -> LinearLogits:
        return LinearLogits(self.embed(images), self.table[classes], stride=self.stride)

    def maps(self, images: Tensor, classes) -> dict[str, Tensor]:
        features = torch.sigmoid(self.embed(images))
        return {"first": features[:, 0], "second": features[:, 1]}

    def charts(self) -> dict[str, Tensor]:
        return {"weight/norm per class": self.table.detach().norm(dim=1)}


class Images:
    """Random pictures; truth at another size, with ignored pixels and one class not evaluated."""

    def __init__(self, num_images: int = 5, num_classes: int = NUM_CLASSES) -> None:
        self.num_images, self.num_classes = num_images, num_classes

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int):
        if index >= self.num_images:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        blocks = torch.randint(0, 256, (3, 6, 5), generator=generator).float()
        image = F.interpolate(blocks[None], (26, 22 + index), mode="nearest")[0].byte()
        coarse = torch.randint(0, self.num_classes + 1, (4, 3), generator=generator) + FIRST_ID
        coarse[0, 0] = IGNORE
        truth = F.interpolate(coarse[None, None].float(), (40, 31), mode="nearest")[0, 0].long()
        labels = tuple(sorted(set(truth.flatten().tolist()) - {IGNORE}))
        return image, truth, f"picture-{index}", labels


def evaluated() -> list[EvaluatedClass]:
    return [
        EvaluatedClass(FIRST_ID + index, f"u{index}", f"class {index}",
                       "base" if index < 4 else "novel", 10**index)
        for index in range(NUM_CLASSES)
    ]  # fmt: skip
