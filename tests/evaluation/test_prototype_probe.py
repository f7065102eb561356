"""The prototype probe without full-size feature maps = the probe as it is defined."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from evaluation.stand_in import ColorMethod, Images, evaluated

from memseg_dist.batch import IGNORE
from memseg_dist.evaluation import prototype_probe
from memseg_dist.evaluation.evaluate import Evaluation
from memseg_dist.evaluation.metrics import EvaluatedClass
from memseg_dist.evaluation.prototype_probe import (
    draw_points,
    nearest_prototype,
    probe_prototypes,
    upsampled_norm,
)


def naive(features, points, size, out_size):
    """Upsample the features, normalise again, cosine to each point, the largest per class."""
    whole = [4 * positions for positions in features.shape[-2:]]
    full = F.interpolate(features[None], whole, mode="bilinear")[0, :, : size[0], : size[1]]
    full = F.normalize(full, dim=0)
    ids = sorted(points)
    maps = []
    for class_index in ids:
        seeds = full[:, points[class_index][:, 0], points[class_index][:, 1]]
        maps.append(torch.einsum("dp,dyx->pyx", seeds, full).amax(dim=0))
    maps = F.interpolate(torch.stack(maps)[None], out_size, mode="bilinear")[0]
    return torch.tensor(ids)[maps.argmax(dim=0)]


@pytest.mark.parametrize("strip_bytes", [1, 10**9])
@pytest.mark.parametrize("size", [(32, 40), (29, 43)])
def test_equals_the_definition(monkeypatch, strip_bytes, size):
    monkeypatch.setattr(prototype_probe, "STRIP_BYTES", strip_bytes)
    generator = torch.Generator().manual_seed(0)
    low = [-(-length // 4) for length in size]
    features = F.normalize(torch.randn(16, *low, generator=generator, dtype=torch.float64), dim=0)
    truth = torch.randint(-1, 5, (50, 61), generator=generator)
    points = draw_points(truth, size, 3, (0, 0, "key"))
    norm = upsampled_norm(features, size, 4)
    found = nearest_prototype(features, norm, points, truth, 4)
    assert torch.equal(found, naive(features, points, size, truth.shape))


def test_points_lie_in_their_class_and_depend_on_the_key():
    truth = torch.tensor([[0, 0, 2], [IGNORE, 2, 2]])
    points = draw_points(truth, (2, 3), 2, (0, 0, "a"))
    assert sorted(points) == [0, 2]
    for class_index, pixels in points.items():
        assert pixels.shape == (2, 2)
        assert (truth[pixels[:, 0], pixels[:, 1]] == class_index).all()
    again = draw_points(truth, (2, 3), 2, (0, 0, "a"))
    assert all(torch.equal(points[key], again[key]) for key in points)
    wide = torch.zeros(1, 1000, dtype=torch.int64)
    draws = {draw_points(wide, (1, 1000), 1, (0, run, "a"))[0][0, 1].item() for run in range(20)}
    assert len(draws) > 15


def test_absent_classes_never_win():
    """The one class shown has negative cosines; with 0 for absent classes it would lose."""
    features = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)])
    features[:, :, 2:] *= -1
    truth = torch.full((4, 4), 3)
    points = {3: torch.tensor([[0, 0]])}
    found = nearest_prototype(features, upsampled_norm(features, (4, 4), 1), points, truth, 1)
    assert torch.equal(found, truth)


def test_compact_features_score_100():
    class Perfect(ColorMethod):
        stride = 1

        def embed(self, images):
            return F.one_hot(images[:, 0].long(), 8).permute(0, 3, 1, 2).float()

    class Stripes(Images):
        def __getitem__(self, index):
            truth = torch.arange(12).div(4, rounding_mode="floor").repeat(9, 1)
            return truth.byte().repeat(3, 1, 1), truth + 3, str(index), ()

    result = probe_prototypes(Evaluation(Perfect(), Stripes(2), evaluated(), "cpu"), num_runs=2)
    assert result.mean() == 100.0 and result.std() == 0.0
    assert result.runs[0].groups["all"].num_absent == 3


def test_a_group_of_which_nothing_is_shown_is_nan():
    shown = Images(1)
    item = EvaluatedClass(999, "name:unseen", "unseen", "novel", None)
    classes = [*evaluated()[:1], item]
    result = probe_prototypes(Evaluation(ColorMethod(), shown, classes, "cpu"))
    assert math.isnan(result.mean("novel")) and math.isnan(result.std("novel"))
    assert "nan" in result.table()


def run_probe():
    evaluation = Evaluation(ColorMethod(), Images(3), evaluated(), "cpu", show_progress=False)
    result = probe_prototypes(evaluation, num_points=2)
    return result.to_json(), result.table()


def test_runs_differ_and_ranks_agree(process_pool):
    data, table = run_probe()
    assert len(data["runs"]) == 5 and data["groups"]["all"]["std"] > 0
    assert "novel" in table
    assert process_pool(2).run(run_probe) == [(data, table)] * 2
