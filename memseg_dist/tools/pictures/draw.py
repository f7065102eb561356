"""What a run shows of itself: panels of a few validation images, charts and class vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.evaluation.evaluate import Evaluation, EvaluationImages, to_evaluated
from memseg_dist.evaluation.metrics import EvaluatedClass
from memseg_dist.evaluation.sliding import segment
from memseg_dist.methods.method import PER_CLASS, evaluation_mode
from memseg_dist.nn.resize import upsample_positions
from memseg_dist.tools.pictures.panels import Pixels, fit, panel, to_pixels
from memseg_dist.tools.pictures.vectors import draw_class_vectors

SEARCHED_PER_PANEL = 25
"""How many images are looked at, per panel wanted, for one that shows a novel class."""
MAX_BARS, MAX_NAMED_BARS = 128, 200
"""A chart of more figures, or of more classes, is a histogram."""


def draw_validation(
    evaluation: Evaluation,
    num_panels: int,
    charts: Mapping[str, Tensor],
    class_vectors: tuple[Tensor, Tensor] | None,
) -> Iterator[tuple[str, Pixels]]:
    """The pictures of one evaluation by name: a run's `train.validate.Draw`."""
    for number, (_, picture) in enumerate(draw_panels(evaluation, num_panels)):
        yield f"panels/{number:02d}", picture
    names = {item.class_id: item.name for item in evaluation.classes}
    for name, values in charts.items():
        bar_names = names if name.endswith(PER_CLASS) else None
        yield f"charts/{name}", draw_chart(name, values.numpy(), bar_names)
    if class_vectors is not None:
        yield from draw_class_vectors(evaluation, class_vectors, with_images=num_panels > 0)


def draw_panels(evaluation: Evaluation, num_panels: int) -> list[tuple[str, Pixels]]:
    """image | truth | prediction | maps of the same images each time, with their keys. No
    collective: rank 0's.

    Images that show a novel class come first, each with another novel class in focus as far as
    there are enough; without novel classes the first images, with their largest class in focus.
    """
    drawn, method, classes = [], evaluation.method, evaluation.classes
    with evaluation_mode(method):
        for index, focus in choose_images(evaluation.dataset, classes, num_panels):
            image, truth, key, _ = evaluation.dataset[index]
            target = to_evaluated(truth.to(evaluation.device), evaluation.class_ids)
            image = image.to(evaluation.device)
            size = (image.shape[-2], image.shape[-1])
            prediction = segment(method.predict, image, evaluation.class_ids, evaluation.inference)
            small = F.interpolate(target[None, None].double(), size, mode="nearest")[0, 0].long()
            maps = {
                name: upsample_positions(low, size, method.stride)
                for name, low in method.maps(image[None], [classes[focus].class_id]).items()
            }
            picture = panel(
                image.permute(1, 2, 0).cpu().numpy(),
                small.cpu().numpy(),
                prediction.cpu().numpy(),
                {
                    f"{name}: {classes[focus].name}": enlarged[0].cpu().numpy()
                    for name, enlarged in maps.items()
                },
                [item.name for item in classes],
            )
            drawn.append((key, picture))
    return drawn


def choose_images(
    dataset: EvaluationImages, classes: Sequence[EvaluatedClass], num_panels: int
) -> list[tuple[int, int]]:
    """(image, class in focus) pairs: indices into `dataset` and `classes`. Deterministic."""
    ids = torch.tensor([item.class_id for item in classes])
    novel = {index for index, item in enumerate(classes) if item.group == "novel"}
    found: list[tuple[int, int, int]] = []
    unseen = set(novel)  # novel classes that were in no focus yet
    for index in range(min(len(dataset), num_panels * SEARCHED_PER_PANEL)):
        if len(novel - unseen) >= num_panels:
            break
        shown = _largest_first(to_evaluated(dataset[index][1], ids))
        ranked = [(focus not in unseen) + (focus not in novel) for focus in shown]
        if shown:
            rank = min(ranked)
            focus = shown[ranked.index(rank)]
            found.append((rank, index, focus))
            unseen.discard(focus)
    return [(index, focus) for _, index, focus in sorted(found)[:num_panels]]


def _largest_first(truth: Tensor) -> list[int]:
    """The classes present, by pixels."""
    values, counts = truth[truth != IGNORE].unique(return_counts=True)
    return values[counts.argsort(descending=True, stable=True)].tolist()


def draw_chart(
    title: str, values: NDArray[np.floating], names: Mapping[int, str] | None = None
) -> Pixels:
    """`values` [n] as bars in their order, or beyond MAX_BARS of them as a histogram.

    names: of some or all bars, by index; the bars then lie below each other, each beside its name,
    up to MAX_NAMED_BARS of them.

    Returns uint8 [300, 800, 3], or with names as high as they need. Values that are not finite are
    left out and counted in the title. ValueError if `values` has more than one axis.
    """
    if values.ndim != 1:
        raise ValueError(f"chart '{title}' has values of shape {values.shape}; it must be [n]")
    is_finite = np.isfinite(values)
    num_missing, places = int((~is_finite).sum()), np.flatnonzero(is_finite)
    has_names = bool(names) and len(values) <= MAX_NAMED_BARS
    height = max(3.0, 0.6 + 0.16 * len(values)) if has_names else 3.0
    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{title}  ({num_missing} not finite)" if num_missing else title, fontsize=10)
    axes.tick_params(labelsize=8)
    if names and has_names:
        axes.margins(y=0.01)
        axes.barh(places, values[is_finite], height=0.8)
        texts = [fit(names.get(index, str(index)), 24) for index in range(len(values))]
        axes.set_yticks(range(len(values)), texts)
        axes.invert_yaxis()
    elif len(values) <= MAX_BARS:
        axes.margins(x=0.01)
        axes.bar(places, values[is_finite], width=0.8)
        axes.set_xlabel("index", fontsize=8)
    else:
        axes.hist(values[is_finite], bins=64)
        axes.set_xlabel("value", fontsize=8)
        axes.set_ylabel(f"how many of {len(values):,}", fontsize=8)
    return to_pixels(figure)
