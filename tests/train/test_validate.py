"""The evaluation of a run looks at images as its settings say, and so do its pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from train.shards import larvseg_config, write_squares

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.evaluation.sliding import Inference, segment
from memseg_dist.tools.pictures.draw import draw_validation
from memseg_dist.train.validate import Validator


class Silent:
    def log_image(self, name, image, step): ...

    def log_text(self, name, text): ...


@pytest.fixture
def config(tmp_path):
    for name, num_classes, with_masks in (("masks", 2, 1), ("weak", 4, 0), ("val", 4, 1)):
        write_squares(tmp_path / name, 2, num_classes, with_masks=bool(with_masks))
    config = larvseg_config(tmp_path, tmp_path / "out")
    validation = dataclasses.replace(
        config.validation, scales=(1.0, 1.5), flip=True, swap=(("n3", "n1"),), max_images=1
    )
    return dataclasses.replace(config, validation=validation)


def test_scores_and_panels_see_the_same_views(config, monkeypatch):
    found = []

    def watched(predict, image, classes, inference, *rest):
        found.append(inference)
        return segment(predict, image, classes, inference, *rest)

    monkeypatch.setattr("memseg_dist.evaluation.evaluate.segment", watched)
    monkeypatch.setattr("memseg_dist.tools.pictures.draw.segment", watched)
    space = build_label_space(config)
    validate = Validator(config, space, torch.device("cpu"), draw_validation)
    validate(build_method(config, space), Silent(), 1)
    ids = space.vocabulary.index("n3"), space.vocabulary.index("n1")
    options = {"scales": (1.0, 1.5), "flip": True, "swap": (ids,)}
    assert found == [Inference("whole", (32, 32), **options)] * 2


def test_an_unknown_class_to_swap_is_refused_before_the_first_step(config):
    validation = dataclasses.replace(config.validation, swap=(("n3", "n9"),))
    config = dataclasses.replace(config, validation=validation)
    with pytest.raises(ValueError, match=r"validation.swap: .*no class has uid 'n9'"):
        Validator(config, build_label_space(config), torch.device("cpu"))
