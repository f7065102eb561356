"""The evaluation of a training run: figures, table per class, panels of some images, charts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from memseg_dist import dist
from memseg_dist.config import RunConfig
from memseg_dist.data.index import Index
from memseg_dist.data.loader import EvalDataset
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.evaluation.evaluate import evaluate, evaluated_classes
from memseg_dist.evaluation.sliding import Inference
from memseg_dist.methods.method import Method
from memseg_dist.train.platform import Tracker

EVALUATION = "val/"
"""What the names of an evaluation's figures begin with."""


Draw = Callable[..., Iterable[tuple[str, np.ndarray]]]
"""draw(method, dataset, classes, num_panels, device, inference, charts) -> the pictures beside an
evaluation's figures, uint8 [H, W, 3] by name. Called on rank 0, no collective. charts:
`Method.charts()`.
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
            training_images=training_image_counts(config, label_space),
        )
        self.inference = Inference.of(settings, label_space.vocabulary)
        self.dataset = EvalDataset(
            settings.path,
            label_space,
            settings.name,
            resize=settings.resize,
            cache_dir=config.cache_directory,
        )

    def __call__(self, method: Method, tracker: Tracker, step: int) -> dict[str, float]:
        """All / Base / Novel mIoU and more; table, panels and charts logged. Collective."""
        settings = self.settings
        charts = method.charts()
        result = evaluate(
            method,
            self.dataset,
            self.classes,
            device=self.device,
            inference=self.inference,
            max_images=settings.max_images,
            num_processes=self.config.loader.processes,
        )
        if dist.rank() == 0 and self.draw is not None:
            pictures = self.draw(
                method,
                self.dataset,
                self.classes,
                settings.num_panels,
                self.device,
                self.inference,
                charts,
            )
            for name, image in pictures:
                tracker.log_image(name, image, step)
        dist.barrier()
        if dist.rank() == 0:
            text = f"{result.table()}\n\n{result.scores.class_table()}\n"
            tracker.log_text(f"validation/step-{step:08d}.txt", text)
        return result.scores.metrics(prefix=EVALUATION)


def training_image_counts(config: RunConfig, label_space: LabelSpace) -> np.ndarray:
    """Per label-space id the number of training images labelled with it, from the indexes."""
    counts = np.zeros(len(label_space), dtype=np.int64)
    for source in config.sources:
        to_union = label_space.to_union[source.name]
        index = Index.open(source.path, config.cache_directory)
        np.add.at(counts, to_union, index.class_image_counts(len(to_union)))
    return counts
