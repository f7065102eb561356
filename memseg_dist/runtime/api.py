"""What a platform offers the training loop: a place to run (`Context`) and an ear (`Tracker`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch


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


class Tracker(Protocol):
    """Where figures go. Only rank 0 holds one that writes. No call raises on a tracking failure."""

    def log_params(self, params: Mapping[str, str]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        """image: uint8 [H, W, 3], RGB."""
        ...

    def log_text(self, name: str, text: str) -> None:
        """`text` as the artifact file `name` (tables/per_class.csv)."""
        ...

    def log_artifact(self, path: str) -> None:
        """The local file `path`."""
        ...

    def finish(self, status: str) -> None:
        """status: finished (all steps done), stopped (will be resumed) or failed."""
        ...


class NullTracker:
    """Listens to nothing."""

    def log_params(self, params: Mapping[str, str]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        pass

    def log_text(self, name: str, text: str) -> None:
        pass

    def log_artifact(self, path: str) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


class ConsoleTracker(NullTracker):
    """One line per call of `log_metrics`, on standard output."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"step {step}  {figures}", flush=True)

    def finish(self, status: str) -> None:
        print(f"run {status}", flush=True)


class Trackers(NullTracker):
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log_params(self, params: Mapping[str, str]) -> None:
        for tracker in self.trackers:
            tracker.log_params(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log_metrics(metrics, step)

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        for tracker in self.trackers:
            tracker.log_image(name, image, step)

    def log_text(self, name: str, text: str) -> None:
        for tracker in self.trackers:
            tracker.log_text(name, text)

    def log_artifact(self, path: str) -> None:
        for tracker in self.trackers:
            tracker.log_artifact(path)

    def finish(self, status: str) -> None:
        for tracker in self.trackers:
            tracker.finish(status)
