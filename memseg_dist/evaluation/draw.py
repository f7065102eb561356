"""What a run shows of itself: panels of a few validation images, novel classes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.evaluation.evaluate import EvaluationImages, evaluation_mode, to_evaluated
from memseg_dist.evaluation.metrics import EvaluatedClass
from memseg_dist.evaluation.panels import Pixels, panel
from memseg_dist.evaluation.sliding import Mode, segment, upsample_positions
from memseg_dist.methods.method import Method

SEARCHED_PER_PANEL = 25
"""How many images are looked at, per panel wanted, for one that shows a novel class."""


@dataclass(frozen=True)
class DrawnPanel:
    """`image`: uint8 [H, W, 3]; `focus`: the class whose maps are shown."""

    key: str
    focus: EvaluatedClass
    image: Pixels


def draw_panels(
    method: Method,
    dataset: EvaluationImages,
    classes: Sequence[EvaluatedClass],
    *,
    num_panels: int,
    device: torch.device | str,
    mode: Mode = "slide",
    window: int = 512,
    stride: int = 512,
) -> list[DrawnPanel]:
    """image | truth | prediction | maps of the same images each time. No collective: rank 0's.

    Images that show a novel class come first, each with another novel class in focus as far as
    there are enough; without novel classes the first images, with their largest class in focus.
    """
    ids = torch.tensor([item.class_id for item in classes], device=device)
    drawn = []
    with evaluation_mode(method):
        for index, focus in choose_images(dataset, classes, num_panels):
            image, truth, key, _ = dataset[index]
            target = to_evaluated(truth.to(device), ids)
            image = image.to(device)
            size = (image.shape[-2], image.shape[-1])
            options = {"mode": mode, "window": window, "stride": stride}
            prediction = segment(method.predict, image, ids, **options)  # type: ignore[arg-type]
            small = F.interpolate(target[None, None].double(), size, mode="nearest")[0, 0].long()
            maps = method.maps(image[None], [classes[focus].class_id])
            picture = panel(
                image.permute(1, 2, 0).cpu().numpy(),
                small.cpu().numpy(),
                prediction.cpu().numpy(),
                {
                    f"{name}: {classes[focus].name}": upsample_positions(low, size)[0].cpu().numpy()
                    for name, low in maps.items()
                },
                [item.name for item in classes],
            )
            drawn.append(DrawnPanel(key, classes[focus], np.asarray(picture)))
    return drawn


def choose_images(
    dataset: EvaluationImages, classes: Sequence[EvaluatedClass], num_panels: int
) -> list[tuple[int, int]]:
    """(image, class in focus) pairs: indices into `dataset` and `classes`. Deterministic."""
    ids = torch.tensor([item.class_id for item in classes])
    novel = {index for index, item in enumerate(classes) if item.group == "novel"}
    fresh: list[tuple[int, int]] = []
    repeated: list[tuple[int, int]] = []
    plain: list[tuple[int, int]] = []
    for index in range(min(len(dataset), num_panels * SEARCHED_PER_PANEL)):
        if len(fresh) >= num_panels:
            break
        areas = _areas(to_evaluated(dataset[index][1], ids))
        shown = [class_index for class_index in areas if class_index in novel]
        unseen = [item for item in shown if item not in {focus for _, focus in fresh}]
        if unseen:
            fresh.append((index, unseen[0]))
        elif shown:
            repeated.append((index, shown[0]))
        elif areas:
            plain.append((index, next(iter(areas))))
    return [*fresh, *repeated, *plain][:num_panels]


def _areas(truth: Tensor) -> dict[int, int]:
    """Pixels per class present, the largest first."""
    values, counts = truth[truth != IGNORE].unique(return_counts=True)
    pairs = sorted(zip(values.tolist(), counts.tolist()), key=lambda pair: (-pair[1], pair[0]))
    return dict(pairs)
