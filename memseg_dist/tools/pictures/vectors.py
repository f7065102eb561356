"""Pictures of a method's class vectors: how alike they are, and where they lie among pixels.

Both are drawn at every evaluation under one name, so a tracker's slider shows how they develop. The
colours and names of classes are those of the panels.

Shape letters: n vectors, P pixels, D channels, h x w positions of the feature map, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.evaluation.evaluate import Evaluation, to_evaluated
from memseg_dist.evaluation.prototype_probe import draw_points
from memseg_dist.methods.method import evaluation_mode
from memseg_dist.nn.resize import padded_size
from memseg_dist.tools.pictures.panels import Pixels, class_colors, fit, to_pixels

MAX_NAMES = 64
"""More classes than this have no names beside the matrix, and no place in one legend."""
LARGEST_CLASSES = 20
"""How many classes the embedding shows where there are more than MAX_NAMES."""
MAX_ROWS = 1024
"""Rows of the matrix; it has no more pixels than that."""
MAX_IMAGES, MAX_PER_IMAGE = 16, 200
"""Images looked at for pixels, and pixels of one class taken from one of them."""
MAX_PIXELS, MAX_STARS = 1000, 200
"""Points of the embedding; t-SNE takes 2 seconds for these pixels."""
MIN_PIXELS = 10
NEIGHBOURS = 10
"""The pixels whose middle is the place of a star."""
PERPLEXITY, ITERATIONS = 30, 500


class Vectors(NamedTuple):
    """values: float32 [n, D]; labels: int64 [n], ascending positions in the evaluated classes."""

    values: NDArray[np.float32]
    labels: NDArray[np.int64]


def draw_class_vectors(
    evaluation: Evaluation, class_vectors: tuple[Tensor, Tensor], *, with_images: bool = True
) -> Iterator[tuple[str, Pixels]]:
    """The matrix and, `with_images`, the embedding, by name; what has too little to show is left
    out.

    class_vectors: what `Method.class_vectors` returned; only those of the evaluated classes
    (ascending by id) are drawn. No collective: rank 0's.
    """
    names = [item.name for item in evaluation.classes]
    labels = to_evaluated(class_vectors[0], evaluation.class_ids.cpu())
    values = class_vectors[1][labels != IGNORE].float()
    vectors = Vectors(values.numpy(), labels[labels != IGNORE].numpy())
    pictures = {"class vectors/similarity": similarity_matrix(vectors, names)}
    if with_images and len(vectors.labels) > 1:
        pixels = sample_pixels(evaluation)
        pictures["class vectors/embedding"] = embedding(pixels, vectors, names)
    for name, picture in pictures.items():
        if picture is not None:
            yield name, picture


def similarity_matrix(vectors: Vectors, names: Sequence[str]) -> Pixels | None:
    """The cosine similarity of every two vectors, from -1 to 1: uint8 [800, 900, 3].

    Classes are in the order of `names`, those with several vectors between lines. Of more than
    MAX_ROWS vectors every n-th is shown. None for fewer than two.
    """
    num_vectors = len(vectors.labels)
    if num_vectors < 2:
        return None
    shown = _spread(num_vectors, MAX_ROWS)
    unit = _unit(vectors.values[shown])
    cosine = unit @ unit.T
    mean = cosine[~np.eye(len(shown), dtype=bool)].mean()
    figure = Figure(figsize=(9, 8), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    part = f"{len(shown):,} of " if len(shown) < num_vectors else ""
    title = f"cosine similarity of {part}{num_vectors:,} class vectors, {mean:.3f} on average"
    axes.set_title(title, fontsize=10)
    image = axes.imshow(cosine, cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
    labels, first, counts = np.unique(vectors.labels[shown], return_index=True, return_counts=True)
    if len(labels) > MAX_NAMES:
        axes.set_xticks([])
        axes.set_yticks([])
        return to_pixels(figure)
    middle, texts = first + (counts - 1) / 2, [fit(names[label], 18) for label in labels]
    size = 9 if len(labels) <= 24 else 6.5
    axes.set_xticks(middle, texts, rotation=90, fontsize=size)
    axes.set_yticks(middle, texts, fontsize=size)
    if counts.max() > 1:
        for border in first[1:] - 0.5:
            axes.axhline(border, color="black", linewidth=0.6)
            axes.axvline(border, color="black", linewidth=0.6)
    return to_pixels(figure)


def sample_pixels(evaluation: Evaluation) -> Vectors:
    """Features of at most MAX_PIXELS pixels of a few images, as many of each class as it has.

    Of more than MAX_NAMES evaluated classes only the LARGEST_CLASSES most frequent of the images
    are taken. The same pixels each time.
    """
    found: dict[int, list[NDArray[np.float32]]] = {}
    class_ids = evaluation.class_ids.cpu()
    with evaluation_mode(evaluation.method):
        for index in _spread(len(evaluation.dataset), MAX_IMAGES).tolist():
            image, truth, key, _ = evaluation.dataset[index]
            features = evaluation.method.embed(image[None].to(evaluation.device))[0].float()
            size = (image.shape[-2], image.shape[-1])
            target = truth_of_positions(
                to_evaluated(truth, class_ids), size, features, evaluation.method.stride
            )
            low_size = (target.shape[0], target.shape[1])
            for label, points in draw_points(target, low_size, MAX_PER_IMAGE, (key,)).items():
                row, column = points.unbind(1)
                found.setdefault(label, []).append(features[:, row, column].T.cpu().numpy())
    per_class = {label: np.concatenate(parts) for label, parts in found.items()}
    labels = sorted(per_class, key=lambda label: (-len(per_class[label]), label))
    labels = sorted(labels[:LARGEST_CLASSES] if len(class_ids) > MAX_NAMES else labels)
    if not labels:
        return Vectors(np.empty((0, 0), np.float32), np.empty(0, np.int64))
    share = MAX_PIXELS // len(labels)
    taken = [per_class[label][_spread(len(per_class[label]), share)] for label in labels]
    counts = [len(values) for values in taken]
    return Vectors(np.concatenate(taken), np.repeat(np.array(labels, np.int64), counts))


def truth_of_positions(
    truth: Tensor, size: tuple[int, int], features: Tensor, stride: int
) -> Tensor:
    """int64 [h, w]: the truth [H, W] of an image of `size` at the positions of `features`
    [D, h, w], of `stride` pixels each, by nearest neighbours; IGNORE in the network's padding.
    """
    small = F.interpolate(truth[None, None].double(), size, mode="nearest")
    whole = padded_size(size, stride)
    margin = (0, whole[1] - size[1], 0, whole[0] - size[0])
    padded = F.pad(small, margin, value=float(IGNORE))
    return F.interpolate(padded, features.shape[-2:], mode="nearest-exact")[0, 0].long()


def embedding(pixels: Vectors, vectors: Vectors, names: Sequence[str]) -> Pixels | None:
    """t-SNE of `pixels` by cosine distance, with each of `vectors` as a star amid the pixels that
    are nearest to it, coloured by class: uint8 [800, 1000, 3].

    Stars of classes without pixels are left out, and the last ones of classes that have many.
    Deterministic. None for fewer than two stars or MIN_PIXELS pixels, where all pixels are one, and
    for values that are not finite.
    """
    shown = np.unique(pixels.labels)
    within = np.arange(len(vectors.labels)) - np.searchsorted(vectors.labels, vectors.labels)
    is_star = within < max(1, MAX_STARS // max(len(shown), 1))
    is_star &= np.isin(vectors.labels, shown)
    stars = Vectors(vectors.values[is_star], vectors.labels[is_star])
    if len(stars.labels) < 2 or len(pixels.labels) < MIN_PIXELS:
        return None
    unit, unit_stars = _unit(pixels.values), _unit(stars.values)
    if not (unit.std(axis=0).max() > 1e-6 and np.isfinite(unit_stars).all()):
        return None
    # A star is no point of the t-SNE: the nearest neighbour of a whole class is flung out of it.
    dot_at = _tsne(unit)
    nearest = np.argsort(-unit_stars @ unit.T, axis=1, kind="stable")[:, :NEIGHBOURS]
    return _scatter(
        Vectors(dot_at, pixels.labels),
        Vectors(np.median(dot_at[nearest], axis=1), stars.labels),
        {label: names[label] for label in shown.tolist()},
    )


def _tsne(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, D] -> [n, 2]."""
    # here: two seconds that only a drawing rank needs
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    model = TSNE(
        perplexity=perplexity, metric="cosine", init="pca", max_iter=ITERATIONS, random_state=0
    )
    # thousands of short loops: beside loader processes, threads would wait for each other in each
    with threadpool_limits(1):
        return model.fit_transform(points)


def _scatter(dots: Vectors, stars: Vectors, names: Mapping[int, str]) -> Pixels:
    """dots, stars: D = 2. names: of the classes in the legend."""
    colors = {label: f"#{bytes(rgb).hex()}" for label, rgb in class_colors(names).items()}
    figure = Figure(figsize=(10, 8), dpi=100, layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[])
    counts = f"{len(dots.labels):,} pixels of validation images; {len(stars.labels)} class vectors"
    axes.set_title(f"t-SNE of {counts} amid their nearest pixels", fontsize=10)
    axes.set_aspect("equal", adjustable="datalim")
    # shuffled: in the order of the classes the last one would cover the others
    order = np.random.default_rng(0).permutation(len(dots.labels))
    dot_colors = [colors[label] for label in dots.labels[order].tolist()]
    x, y = dots.values[order].T
    axes.scatter(x, y, c=dot_colors, s=14, linewidths=0, alpha=0.75)
    star_colors = [colors[label] for label in stars.labels.tolist()]
    area = 260 if len(stars.labels) <= MAX_NAMES else 110
    x, y = stars.values.T
    axes.scatter(x, y, c=star_colors, s=area, marker="*", edgecolors="black", linewidths=0.8)
    star = Line2D([], [], marker="*", markersize=11, linestyle="", color="white")
    star.set(markeredgecolor="black", markeredgewidth=0.6, label="class vector")
    handles = [star] + [
        Line2D([], [], marker="o", linestyle="", color=colors[label], label=fit(name, 20))
        for label, name in names.items()
    ]
    is_long = len(handles) > 32
    figure.legend(
        handles=handles,
        loc="outside right upper",
        ncols=2 if is_long else 1,
        fontsize=7 if is_long else 9,
        frameon=False,
    )
    return to_pixels(figure)


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)


def _spread(count: int, limit: int) -> NDArray[np.int64]:
    """All of 0 .. count - 1, or `limit` of them as far apart as can be."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)
