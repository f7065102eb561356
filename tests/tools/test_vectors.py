"""Class vectors are shown as they are: how alike, of which class, and among which pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation.stand_in import FIRST_ID, ColorMethod, Images, evaluated

from memseg_dist.batch import IGNORE
from memseg_dist.evaluation.evaluate import Evaluation, to_evaluated
from memseg_dist.evaluation.metrics import EvaluatedClass
from memseg_dist.evaluation.sliding import Inference
from memseg_dist.methods.method import evaluation_mode
from memseg_dist.tools.pictures.draw import draw_validation
from memseg_dist.tools.pictures.panels import class_colors
from memseg_dist.tools.pictures.vectors import (
    LARGEST_CLASSES,
    MAX_NAMES,
    MAX_PIXELS,
    MAX_ROWS,
    MIN_PIXELS,
    Vectors,
    embedding,
    sample_pixels,
    similarity_matrix,
    truth_of_positions,
)

NAMES = [f"class {index}" for index in range(5000)]
SIZE = (800, 900, 3)


def vectors(values, labels=None) -> Vectors:
    values = np.asarray(values, np.float32)
    return Vectors(values, np.arange(len(values)) if labels is None else np.asarray(labels))


def clusters(classes, per_class: int, noise: float = 0.1, dim: int = 16) -> Vectors:
    """Points around one axis of the space per class."""
    labels = np.repeat(classes, per_class)
    offset = noise * np.random.default_rng(0).normal(size=(len(labels), dim))
    return vectors(np.eye(dim)[labels] + offset, labels)


def cells(picture: np.ndarray, count: int) -> np.ndarray:
    """[count, count, 3]: the colours of the cells of a matrix, found by its frame."""
    is_black = (picture[:, :800] == 0).all(axis=-1)
    rows = np.flatnonzero(is_black.sum(axis=1) > 400)
    columns = np.flatnonzero(is_black.sum(axis=0) > 400)

    def middles(first, last):
        return (first + (np.arange(count) + 0.3) * (last - first) / count).astype(int)

    return picture[np.ix_(middles(rows[0], rows[-1]), middles(columns[0], columns[-1]))]


# ---------------------------------------------------------------- the matrix


def test_the_matrix_shows_the_cosine_of_every_two_vectors():
    picture = similarity_matrix(vectors([[1, 0], [0.2, 0], [0, 2], [-3, 0]]), NAMES)
    assert picture.dtype == np.uint8 and picture.shape == SIZE
    found = cells(picture, 4).astype(int)
    same, other, opposite = found[0, 0], found[0, 2], found[0, 3]
    assert np.abs(same - [103, 0, 31]).max() < 3  # the red end of the scale: 1
    assert np.abs(other - 247).max() < 3  # its middle: 0
    assert np.abs(opposite - [5, 48, 97]).max() < 3  # the blue end: -1
    cosine = np.array([[1, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]])
    for value, color in ((1, same), (0, other), (-1, opposite)):
        assert (found[cosine == value] == color).all()


def test_the_matrix_names_classes_while_names_fit():
    def ink_at_the_left(count):
        picture = similarity_matrix(vectors(np.eye(count)), NAMES)
        assert picture.shape == SIZE
        return (picture[100:700, :25] < 128).any()

    assert ink_at_the_left(3) and ink_at_the_left(MAX_NAMES)
    picture = similarity_matrix(vectors(np.eye(MAX_NAMES + 1)), NAMES)
    is_dark = (picture[:, :750] < 50).all(axis=-1)
    assert (is_dark.any(axis=0)[: is_dark.sum(axis=0).argmax()].sum()) == 0  # nothing but the frame


def test_several_vectors_of_a_class_lie_between_lines():
    values = np.eye(4)[[0, 0, 1, 2]]
    lined = similarity_matrix(vectors(values, [0, 0, 1, 2]), NAMES)
    single = similarity_matrix(vectors(values, [0, 1, 2, 3]), NAMES)

    def num_lines(picture):
        is_dark = (picture[:, :750].astype(int).sum(axis=-1) < 400).mean(axis=1) > 0.6
        return np.diff(is_dark.astype(int)).clip(0).sum()

    assert num_lines(lined) == num_lines(single) + 2


def test_more_vectors_than_rows_are_thinned_and_fewer_than_two_are_no_picture():
    many = np.random.default_rng(0).normal(size=(3 * MAX_ROWS, 4))
    assert similarity_matrix(vectors(many), NAMES).shape == SIZE
    assert similarity_matrix(vectors(np.ones((1, 4))), NAMES) is None
    assert similarity_matrix(vectors(np.ones((0, 4))), NAMES) is None
    assert similarity_matrix(vectors(np.zeros((2, 4))), NAMES).shape == SIZE


# ---------------------------------------------------------------- the embedding


@pytest.fixture(scope="module")
def stars_and_dots():
    """Three classes, a vector each in the middle of its pixels, and one of a class without."""
    classes = [1, 4, 9]
    stars = vectors(7 * np.eye(16)[[1, 4, 9, 12]], [1, 4, 9, 12])
    return classes, clusters(classes, 30), stars


def test_the_star_of_a_class_lies_among_the_pixels_of_the_class(stars_and_dots):
    classes, pixels, stars = stars_and_dots
    picture = embedding(pixels, stars, NAMES)
    assert picture.dtype == np.uint8 and picture.shape == (800, 1000, 3)
    assert np.array_equal(picture, embedding(pixels, stars, NAMES))
    plot = picture[:, :840].astype(int)  # beside it is the legend
    star_at, dots_at = {}, {}
    for label, color in class_colors(classes).items():
        star_at[label] = np.argwhere((plot == color).all(axis=-1)).mean(axis=0)
        dot = np.round(0.75 * np.array(color) + 0.25 * 255)
        dots_at[label] = np.argwhere(np.abs(plot - dot).max(axis=-1) <= 2).mean(axis=0)
    for label in classes:
        distance = {c: np.linalg.norm(star_at[label] - dots_at[c]) for c in classes}
        assert min(distance, key=distance.get) == label
        assert distance[label] < 0.3 * sorted(distance.values())[1]


def test_only_classes_with_pixels_have_stars_and_names(stars_and_dots):
    _, pixels, stars = stars_and_dots
    known = vectors(stars.values[:3], stars.labels[:3])
    assert np.array_equal(embedding(pixels, stars, NAMES), embedding(pixels, known, NAMES))


def test_too_little_to_embed_is_no_picture(stars_and_dots):
    _, pixels, stars = stars_and_dots
    few = vectors(pixels.values[: MIN_PIXELS - 1], pixels.labels[: MIN_PIXELS - 1])
    assert embedding(few, stars, NAMES) is None
    assert embedding(vectors(np.empty((0, 0)), []), stars, NAMES) is None
    assert embedding(pixels, vectors(stars.values[:1], stars.labels[:1]), NAMES) is None
    collapsed = vectors(np.ones_like(pixels.values), pixels.labels)
    assert embedding(collapsed, vectors(np.ones((3, 16)), [1, 4, 9]), NAMES) is None
    broken = vectors(np.full_like(pixels.values, np.nan), pixels.labels)
    assert embedding(broken, stars, NAMES) is None
    assert embedding(pixels, vectors(np.full((4, 16), np.nan), stars.labels), NAMES) is None


# ---------------------------------------------------------------- the pixels


def test_sampled_pixels_are_features_of_their_class():
    method, dataset = ColorMethod(), Images()
    evaluation = Evaluation(method, dataset, evaluated(), "cpu")
    pixels, again = sample_pixels(evaluation), sample_pixels(evaluation)
    assert all(np.array_equal(one, other) for one, other in zip(pixels, again, strict=True))
    assert pixels.values.shape == (len(pixels.labels), 8) and (np.diff(pixels.labels) >= 0).all()
    assert set(pixels.labels.tolist()) == set(range(6)) and method.training
    own: dict[int, list[np.ndarray]] = {}
    with evaluation_mode(method):
        for index in range(len(dataset)):
            image, truth, *_ = dataset[index]
            features = method.embed(image[None])[0]
            size = (image.shape[-2], image.shape[-1])
            target = truth_of_positions(
                to_evaluated(truth, evaluation.class_ids), size, features, 4
            )
            for label in range(6):
                own.setdefault(label, []).append(features[:, target == label].T.numpy())
    for value, label in zip(pixels.values, pixels.labels.tolist(), strict=True):
        assert (np.concatenate(own[label]) == value).all(axis=1).any()


def many_classes(num_classes: int) -> Evaluation:
    """A method and images of 40 x 40 positions that show class c in a share that grows with c."""

    class Whole(ColorMethod):
        stride = 1

        def embed(self, images):
            return images[:, :1].float().expand(-1, 4, -1, -1)

    class Shares(Images):
        def __getitem__(self, index):
            truth = (num_classes * torch.linspace(0, 0.9999, 1600).sqrt()).long().view(40, 40)
            return truth.expand(3, 40, 40).byte(), truth, f"{index}", ()

    classes = [EvaluatedClass(number, "", "", None, None) for number in range(num_classes)]
    return Evaluation(Whole(), Shares(100), classes, "cpu")


def test_classes_have_equal_shares_and_of_many_the_largest_are_taken():
    pixels = sample_pixels(many_classes(4))
    assert np.bincount(pixels.labels).tolist() == [MAX_PIXELS // 4] * 4
    assert np.array_equal(pixels.values[:, 0], pixels.labels)
    pixels = sample_pixels(many_classes(MAX_NAMES + 6))
    labels, counts = np.unique(pixels.labels, return_counts=True)
    assert len(labels) == LARGEST_CLASSES and labels.min() > MAX_NAMES / 2
    assert set(counts) == {MAX_PIXELS // LARGEST_CLASSES}


def test_truth_is_read_at_the_middle_of_a_position_and_not_in_the_padding():
    truth = torch.arange(6).repeat_interleave(2).expand(4, 12)  # columns 0 0 1 1 2 2 ...
    whole = torch.zeros(3, 1, 2)  # positions of 3 columns, of an image of 2 x 6 pixels
    assert truth_of_positions(truth, (2, 6), whole, 3).tolist() == [[1, 4]]
    truth = torch.arange(13).expand(4, 13)
    padded = torch.zeros(3, 1, 5)  # of 15 columns, of which the image has 13
    assert truth_of_positions(truth, (4, 13), padded, 3).tolist() == [[1, 4, 7, 10, IGNORE]]


# ---------------------------------------------------------------- a run's pictures


def drawn(class_vectors, num_panels: int, classes=None) -> dict[str, np.ndarray]:
    inference = Inference(window=16, stride=16)
    classes = classes or evaluated()
    evaluation = Evaluation(ColorMethod(), Images(), classes, "cpu", inference=inference)
    return dict(draw_validation(evaluation, num_panels, {}, class_vectors))


def test_an_evaluation_shows_the_evaluated_class_vectors():
    ids = torch.tensor([0, FIRST_ID, FIRST_ID + 2, FIRST_ID + 2, 5000])
    values = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    shown = drawn((ids, values), num_panels=1)
    assert set(shown) == {"panels/00", "class vectors/similarity", "class vectors/embedding"}
    own = vectors(values[1:4].numpy(), [0, 2, 2])
    names = [item.name for item in evaluated()]
    assert np.array_equal(shown["class vectors/similarity"], similarity_matrix(own, names))
    assert set(drawn((ids, values), num_panels=0)) == {"class vectors/similarity"}
    assert set(drawn((ids[:2], values[:2]), num_panels=1)) == {"panels/00"}
    assert set(drawn((ids[:0], values[:0]), num_panels=1)) == {"panels/00"}
    assert set(drawn(None, num_panels=1)) == {"panels/00"}
    other = [EvaluatedClass(77, "u", "other", None, None)]
    assert set(drawn((ids, values), num_panels=0, classes=other)) == set()
