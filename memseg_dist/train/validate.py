"""The evaluation of a training run: figures, table per class, panels of some images, charts."""

from __future__ import annotations

import numpy as np
import torch

from memseg_dist import dist
from memseg_dist.config import RunConfig
from memseg_dist.data.index import Index
from memseg_dist.data.loader import EvalDataset
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.evaluation.charts import draw_chart
from memseg_dist.evaluation.draw import draw_panels
from memseg_dist.evaluation.evaluate import evaluate, evaluated_classes
from memseg_dist.methods.method import Method
from memseg_dist.runtime.api import Tracker

EVALUATION = "val/"
"""What the names of an evaluation's figures begin with."""


class Validator:
    """Scores a method on `config.validation`; every class of its vocabulary competes."""

    def __init__(self, config: RunConfig, label_space: LabelSpace, device: torch.device) -> None:
        assert config.validation is not None
        self.config, self.label_space, self.device = config, label_space, device
        self.settings = settings = config.validation
        self.classes = evaluated_classes(
            label_space,
            settings.name,
            base=settings.base,
            novel=settings.novel,
            exclude=settings.exclude,
            training_images=training_image_counts(config, label_space),
        )
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
        is_bf16 = self.config.engine.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
            result = evaluate(
                method,
                self.dataset,
                self.classes,
                device=self.device,
                mode=settings.mode,
                window=settings.window,
                stride=settings.stride,
                max_images=settings.max_images,
                num_processes=self.config.loader.processes,
            )
            if dist.rank() == 0:
                self._draw(method, tracker, step)
        charts = method.charts()
        if dist.rank() == 0:
            for name, values in charts.items():
                tracker.log_image(f"charts/{name}", draw_chart(name, values.numpy()), step)
        dist.barrier()
        scores = result.scores
        if dist.rank() == 0:
            text = f"{result.table()}\n\n{scores.class_table()}\n"
            tracker.log_text(f"validation/step-{step:08d}.txt", text)
        return scores.metrics(prefix=EVALUATION)

    def _draw(self, method: Method, tracker: Tracker, step: int) -> None:
        settings = self.settings
        panels = draw_panels(
            method,
            self.dataset,
            self.classes,
            num_panels=settings.num_panels,
            device=self.device,
            mode=settings.mode,
            window=settings.window,
            stride=settings.stride,
        )
        for number, drawn in enumerate(panels):
            tracker.log_image(f"panels/{number:02d}", drawn.image, step)


def training_image_counts(config: RunConfig, label_space: LabelSpace) -> np.ndarray:
    """Per label-space id the number of training images labelled with it, from the indexes."""
    counts = np.zeros(len(label_space), dtype=np.int64)
    for source in config.sources:
        to_union = label_space.to_union[source.name]
        index = Index.open(source.path, config.cache_directory)
        np.add.at(counts, to_union, index.class_image_counts(len(to_union)))
    return counts
