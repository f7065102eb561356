"""What a platform offers the training loop: a place to run (`Context`) and a `Tracker`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from memseg_dist.train.overview import Overview


class Context(Protocol):
    """One worker's view of the group it trains in."""

    rank: int
    size: int
    device: torch.device

    def report(self, metrics: Mapping[str, float], checkpoint: str | None = None) -> None:
        """Tell the launcher how the run stands. A collective: every rank, at the same step.

        checkpoint: directory or URL of a whole checkpoint that is already in the run's storage.
        """
        ...

    def should_stop(self) -> bool:
        """True once any rank was asked to leave (SIGTERM, preemption notice).

        A collective: every rank calls it at the same step and gets the same answer.
        """
        ...


class Tracker:
    """Where figures go; this one drops them all. Only rank 0 holds one that writes.

    No call raises on a tracking failure.
    """

    def begin(self, overview: Overview) -> None:
        """What the run is, before its first step."""

    def log_params(self, params: Mapping[str, str], defaults: Collection[str] = ()) -> None:
        """The run's settings, flat. defaults: the names of those that nobody changed."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Figures of one step by name."""

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        """image: uint8 [H, W, 3], RGB."""

    def log_text(self, name: str, text: str) -> None:
        """`text` as the artifact file `name` (tables/per_class.csv)."""

    def finish(self, status: str) -> None:
        """status: finished (all steps done), stopped (will be resumed) or failed."""


def picture_path(name: str, step: int) -> str:
    """Where a run keeps the picture `panels/00` of a step: `panels/step-00000800/00.png`."""
    group, _, rest = name.partition("/")
    return f"{group}/step-{step:08d}/{rest.replace('/', ' ')}.png"


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def begin(self, overview: Overview) -> None:
        for tracker in self.trackers:
            tracker.begin(overview)

    def log_params(self, params: Mapping[str, str], defaults: Collection[str] = ()) -> None:
        for tracker in self.trackers:
            tracker.log_params(params, defaults)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log_metrics(metrics, step)

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        for tracker in self.trackers:
            tracker.log_image(name, image, step)

    def log_text(self, name: str, text: str) -> None:
        for tracker in self.trackers:
            tracker.log_text(name, text)

    def finish(self, status: str) -> None:
        for tracker in self.trackers:
            tracker.finish(status)
