"""The evaluation of a training run: figures, a table per class, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from memseg_dist import dist
from memseg_dist.config import RunConfig
from memseg_dist.data.loader import EvalDataset
from memseg_dist.data.pairs import image_counts
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.evaluation.calibration import calibration_errors
from memseg_dist.evaluation.evaluate import Evaluation, evaluate, evaluated_classes
from memseg_dist.evaluation.sliding import Inference
from memseg_dist.methods.method import Method
from memseg_dist.train.platform import Tracker

EVALUATION = "val/"
"""What the names of an evaluation's figures begin with."""


Draw = Callable[..., Iterable[tuple[str, np.ndarray]]]
"""draw(evaluation, num_panels, charts, class_vectors) -> the pictures beside an evaluation's
figures, uint8 [H, W, 3] by name. Called on rank 0, no collective. charts and class_vectors: what
the method's hooks of these names returned.
"""


class Validator:
    """Scores a method on `config.validation`; every class of its vocabulary competes.

    draw: makes the pictures that go to the tracker; None: none are made.
    """

    def __init__(
        self,
        config: RunConfig,
        label_space: LabelSpace,
        device: torch.device,
        draw: Draw | None = None,
    ) -> None:
        assert config.validation is not None
        self.config, self.device, self.draw = config, device, draw
        self.settings = settings = config.validation
        self.classes = evaluated_classes(
            label_space,
            settings.name,
            base=settings.base,
            novel=settings.novel,
            exclude=settings.exclude,
            training_images=image_counts(
                config.active_sources, label_space, config.cache_directory
            ),
        )
        self.inference = Inference.of(settings, label_space.vocabulary)
        self.dataset = EvalDataset(
            settings.path,
            label_space,
            settings.name,
            resize=settings.resize,
            keep_ratio=settings.keep_ratio,
            cache_dir=config.cache_directory,
            cache_bytes=config.loader.cache_bytes,
        )

    def __call__(self, method: Method, tracker: Tracker, step: int) -> dict[str, float]:
        """All / Base / Novel mIoU and more; table and pictures logged. Collective."""
        settings = self.settings
        charts, class_vectors = method.charts(), method.class_vectors()
        evaluation = Evaluation(
            method,
            self.dataset,
            self.classes,
            self.device,
            inference=self.inference,
            max_images=settings.max_images,
            num_processes=self.config.loader.processes,
            show_progress=False,  # it would write over the bar of the run
        )
        if dist.rank() == 0:
            print(f"evaluating {evaluation.num_images:,} images", flush=True)
        result = evaluate(evaluation)
        if dist.rank() == 0 and self.draw is not None:
            for name, image in self.draw(evaluation, settings.num_panels, charts, class_vectors):
                tracker.log_image(name, image, step)
        errors = calibration_errors(evaluation)
        dist.barrier()
        if dist.rank() == 0:
            tracker.log_text(f"validation/step-{step:08d}.csv", result.scores.class_csv())
        calibration = {f"{EVALUATION}ece/{name}": error for name, error in errors.items()}
        return result.scores.metrics(prefix=EVALUATION) | calibration
