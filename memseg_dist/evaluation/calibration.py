"""Expected calibration error: how far a method's confidence is from how often it is right.

    ECE = sum over bins of |sum of correct - sum of confidence| / positions

Positions are put into bins of equal width by the largest probability, their confidence. Of every
source of labels that the method names in `label_sources`, at the positions of its map.

Shape letters: K classes evaluated, h x w positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import IGNORE
from memseg_dist.evaluation.evaluate import Evaluation
from memseg_dist.methods.method import Method, evaluation_mode

NUM_BINS = 15


def calibration_errors(evaluation: Evaluation) -> dict[str, float]:
    """ECE by source, 0..1; {} for a method that names none. Collective."""
    method, device = evaluation.method, evaluation.device
    if type(method).label_sources is Method.label_sources:
        return {}
    # names are the same on every rank, but a rank may have no image to learn them from
    tallies: dict[str, Tensor] = {}
    with evaluation_mode(method):
        for image, truth, _ in evaluation.images():
            for name, found in method.label_sources(image[None], evaluation.class_ids).items():
                tally = tallies.setdefault(name, _empty(device))
                tally += tally_of(found[0], at_centres(truth, found.shape[-2:]))
    names = sorted({name for part in dist.all_gather_object([*tallies]) for name in part})
    totals = [dist.all_reduce_sum(tallies.get(name, _empty(device))) for name in names]
    return {name: calibration_error(total) for name, total in zip(names, totals, strict=True)}


def at_centres(truth: Tensor, size: Sequence[int]) -> Tensor:
    """Truth [H, W] at the centres of h x w positions that cover the image."""
    rows, columns = (
        ((2 * torch.arange(new, device=truth.device) + 1) * old) // (2 * new)
        for old, new in zip(truth.shape, size, strict=True)
    )
    return truth[rows[:, None], columns]


def tally_of(probabilities: Tensor, truth: Tensor) -> Tensor:
    """[bins, 3]: positions, summed confidence and correct positions of each bin. probabilities:
    [K, h, w]; truth: int64 [h, w] of 0..K - 1 or IGNORE.
    """
    known = truth != IGNORE
    confidence, best = probabilities.max(dim=0)
    confidence, is_right = confidence[known].double(), (best == truth)[known]
    bins = (confidence * NUM_BINS).long().clamp_max(NUM_BINS - 1)
    facts = torch.stack([torch.ones_like(confidence), confidence, is_right.double()], dim=1)
    return _empty(truth.device).index_add_(0, bins, facts)


def calibration_error(tally: Tensor) -> float:
    """ECE of a tally [bins, 3]; nan where no position has a truth."""
    positions, confidence, correct = tally.unbind(dim=1)
    return float((correct - confidence).abs().sum() / positions.sum())


def _empty(device: torch.device | str) -> Tensor:
    return torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=device)
