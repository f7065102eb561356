"""Expected calibration error against loops over positions; over ranks; of a method's sources."""

from __future__ import annotations

import math

import torch
from evaluation.stand_in import ColorMethod, Images, evaluated

from memseg_dist.batch import IGNORE
from memseg_dist.evaluation.calibration import (
    NUM_BINS,
    at_centres,
    calibration_error,
    calibration_errors,
    tally_of,
)
from memseg_dist.evaluation.evaluate import Evaluation


class Confident(ColorMethod):
    """Two sources: the softmax of its prediction, and the same made ten times as sure."""

    def label_sources(self, images, classes):
        logits = self.predict(images, classes).dense()
        return {"plain": logits.softmax(dim=1), "sure": (10 * logits).softmax(dim=1)}


def by_loops(pairs: list[tuple[float, bool]]) -> float:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for confidence, is_right in pairs:
        bins[min(int(confidence * NUM_BINS), NUM_BINS - 1)].append((confidence, is_right))
    gaps = [
        len(b) * abs(sum(right for _, right in b) / len(b) - sum(c for c, _ in b) / len(b))
        for b in bins
        if b
    ]
    return sum(gaps) / len(pairs)


def errors_of() -> dict[str, float]:
    return calibration_errors(Evaluation(Confident(), Images(), evaluated(), "cpu"))


def test_equals_the_loops():
    method, images, classes = Confident(), Images(), evaluated()
    ids = torch.tensor([item.class_id for item in classes])
    pairs: dict[str, list[tuple[float, bool]]] = {"plain": [], "sure": []}
    method.eval()
    for image, truth, _, _ in (images[i] for i in range(len(images))):
        for name, found in method.label_sources(image[None], ids).items():
            _, height, width = found[0].shape
            for y in range(height):
                for x in range(width):
                    row = int((y + 0.5) * truth.shape[0] / height)
                    column = int((x + 0.5) * truth.shape[1] / width)
                    class_id = int(truth[row, column])
                    if class_id in ids.tolist():
                        p, best = found[0, :, y, x].max(dim=0)
                        pairs[name].append((p.item(), int(ids[best]) == class_id))
    found = errors_of()
    assert set(found) == set(pairs)
    for name, error in found.items():
        assert math.isclose(error, by_loops(pairs[name]), rel_tol=1e-9)
    assert found["sure"] > found["plain"] + 0.1


def test_the_same_on_any_number_of_ranks(process_pool):
    for found in process_pool(3).run(errors_of):
        for name, error in errors_of().items():
            assert math.isclose(found[name], error, rel_tol=1e-6)  # other threads, other rounding


def test_a_method_without_sources_has_no_error():
    assert calibration_errors(Evaluation(ColorMethod(), Images(), evaluated(), "cpu")) == {}


def test_ignored_positions_do_not_count():
    probabilities = torch.tensor([[[0.9, 0.9]], [[0.1, 0.1]]])
    tally = tally_of(probabilities, torch.tensor([[0, IGNORE]]))
    assert tally[:, 0].sum() == 1
    assert math.isclose(calibration_error(tally), 0.1, rel_tol=1e-6)
    assert math.isnan(calibration_error(tally_of(probabilities, torch.full((1, 2), IGNORE))))


def test_truth_is_read_at_the_centres_of_positions():
    truth = torch.arange(6)[None].expand(4, 6)
    assert at_centres(truth, (2, 3)).tolist() == [[1, 3, 5], [1, 3, 5]]
