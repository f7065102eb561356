"""The prototype probe, LarvSeg's "oracle" (section 3.2, Table 1): do the features already know?

Given which classes an image shows, one random pixel of each is its prototype; every pixel takes
the class of its nearest prototype by cosine. Nothing is learned for the class, so a high score says
that the features of a class that was never labelled are compact.

Unlike the official code, which gives absent classes a score of 0 that can beat a negative cosine, a
class that the image does not show cannot win.

Shape letters: D channels, h x w positions, Y x X pixels of the image given to the model, H x W
pixels of the truth, P points of one class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist.batch import IGNORE, derive_seed
from memseg_dist.evaluation.evaluate import Evaluation
from memseg_dist.evaluation.metrics import SegmentationMetrics, SegmentationScores
from memseg_dist.methods.method import evaluation_mode
from memseg_dist.nn.resize import interpolation_matrix, padded_size, upsample

STRIP_BYTES = 64 * 2**20
"""What a strip of full-size features may take; the whole map would be D x Y x X."""


@dataclass(frozen=True)
class PrototypeProbeResult:
    """`mean` and `std` (of the sample) of each group's mIoU over the runs."""

    runs: tuple[SegmentationScores, ...]
    num_points: int

    def mean(self, group: str = "all") -> float:
        """nan where no class of the group was shown."""
        return float(np.mean([run.miou(group) for run in self.runs]))

    def std(self, group: str = "all") -> float:
        values = [run.miou(group) for run in self.runs]
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        groups = {
            name: {"mean": self.mean(name), "std": self.std(name)} for name in self.runs[0].groups
        }
        runs = [run.to_json()["groups"] for run in self.runs]
        return {"num_points": self.num_points, "groups": groups, "runs": runs}

    def table(self) -> str:
        lines = [f"{'group':<8} {'mIoU':>6} {'std':>6}   ({len(self.runs)} runs)"]
        for name in self.runs[0].groups:
            lines.append(f"{name:<8} {self.mean(name):>6.2f} {self.std(name):>6.2f}")
        return "\n".join(lines)


def probe_prototypes(
    evaluation: Evaluation, *, num_points: int = 1, num_runs: int = 5, seed: int = 0
) -> PrototypeProbeResult:
    """Every image once, whole; `num_runs` draws of the points. A collective."""
    if num_points < 1 or num_runs < 1:
        raise ValueError(f"num_points {num_points} and num_runs {num_runs} must be 1 or more")
    stride = evaluation.method.stride
    metrics = [
        SegmentationMetrics(len(evaluation.classes), evaluation.device) for _ in range(num_runs)
    ]
    with evaluation_mode(evaluation.method):
        for image, target, key in evaluation.images():
            features = evaluation.method.embed(image[None])[0].float()
            size = (image.shape[-2], image.shape[-1])
            with torch.autocast(features.device.type, enabled=False):
                norm = upsampled_norm(features, size, stride)
                for run, metric in enumerate(metrics):
                    points = draw_points(target, size, num_points, (seed, run, key))
                    if points:  # else every class of the image is smaller than a pixel
                        label = nearest_prototype(features, norm, points, target, stride)
                        metric.update(label, target)
    return PrototypeProbeResult(
        tuple(metric.scores(evaluation.classes) for metric in metrics), num_points
    )


def draw_points(
    truth: Tensor, size: tuple[int, int], num_points: int, seed: tuple[int | str, ...]
) -> dict[int, Tensor]:
    """Per class in the truth (int64 [H, W]), at most num_points random pixels [P, 2].

    The truth is brought to the image's size Y x X by nearest neighbours; a class that vanishes by
    that has no points. A function of `seed` and the truth alone.
    """
    small = F.interpolate(truth[None, None].double(), size=size, mode="nearest")[0, 0].long()
    small = small.cpu()
    points = {}
    for class_index in small.unique().tolist():
        if class_index == IGNORE:
            continue
        candidates = (small == class_index).nonzero()
        generator = torch.Generator().manual_seed(derive_seed("oracle", *seed, class_index))
        chosen = torch.randperm(len(candidates), generator=generator)[:num_points]
        points[class_index] = candidates[chosen]
    return points


def nearest_prototype(
    features: Tensor, norm: Tensor, points: dict[int, Tensor], truth: Tensor, stride: int
) -> Tensor:
    """int64 [H, W]: per pixel the class with the largest cosine to one of its points.

    features [D, h, w], of `stride` pixels per position; norm [Y, X] of the upsampled features.
    Cosines are products with the seeds at low resolution, upsampled and divided by the norm: no
    full-size feature map is needed. One class at a time; of equal cosines the smaller class wins.
    """
    size = (norm.shape[0], norm.shape[1])
    out_size = (truth.shape[0], truth.shape[1])
    whole = padded_size(size, stride)
    vertical = interpolation_matrix(whole[0], features.shape[1], features.dtype, features.device)
    horizontal = interpolation_matrix(whole[1], features.shape[2], features.dtype, features.device)
    best = torch.full(out_size, -torch.inf, dtype=features.dtype, device=features.device)
    label = torch.zeros(out_size, dtype=torch.int64, device=features.device)
    for class_index, pixels in sorted(points.items()):
        row, column = pixels.to(features.device).unbind(1)
        seeds_PD = torch.einsum("ph,dhw,pw->pd", vertical[row], features, horizontal[column])
        low_Phw = torch.einsum("pd,dhw->phw", F.normalize(seeds_PD, dim=1), features)
        cosine_PYX = upsample(low_Phw, whole)[:, : size[0], : size[1]] / norm
        score = cosine_PYX.amax(dim=0)
        score = F.interpolate(score[None, None], out_size, mode="bilinear", align_corners=False)
        better = score[0, 0] > best
        best = torch.where(better, score[0, 0], best)
        label[better] = class_index
    return label


def upsampled_norm(features: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """[Y, X]: the length of each pixel's upsampled feature, a strip of rows at a time."""
    whole = padded_size(size, stride)
    rows = max(1, STRIP_BYTES // (4 * features.shape[0] * whole[1]))
    strips = [
        upsample(features, whole, slice(start, min(start + rows, size[0]))).norm(dim=0)
        for start in range(0, size[0], rows)
    ]
    return torch.cat(strips)[:, : size[1]].clamp(min=1e-12)
