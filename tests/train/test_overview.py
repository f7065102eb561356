"""What a run says of itself before its first step, and what it warns of."""

from __future__ import annotations

import dataclasses
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from train.shards import larvseg_config

from memseg_dist.config import ValidationConfig
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.tools.shards import Sample, finish, write_shard
from memseg_dist.train.overview import DataSet, survey

NAMES = ("background", "cat", "bag", "tree")
BACKGROUND, CAT, BAG, TREE = range(4)


def write(root, samples: dict[str, tuple[tuple[int, ...], np.ndarray | None]]) -> None:
    """Images of 10 x 10 pixels with these labels and masks, by key."""
    file = io.BytesIO()
    Image.new("RGB", (10, 10)).save(file, "png")
    rows = [Sample(key, file.getvalue(), "png", *sample) for key, sample in samples.items()]
    write_shard(root, 0, rows, num_classes=len(NAMES))
    finish(root, Vocabulary(tuple(Category(f"u:{name}", name) for name in NAMES)))


def mask(num_cat: int) -> np.ndarray:
    pixels = np.full(100, BACKGROUND, dtype=np.uint16)
    pixels[:num_cat] = CAT
    return pixels.reshape(10, 10)


@pytest.fixture
def config(tmp_path):
    """Masks of cats before a background of 70 %; image labels of cats and bags; no tree at all."""
    cats = ((CAT,), None)
    write(tmp_path / "masks", {"a": ((), mask(20)), "b": ((), mask(40))})
    write(tmp_path / "weak", {"c": cats, "d": cats, "e": ((CAT, BAG), None)})
    write(tmp_path / "val", {"v": ((), mask(50))})
    validation = ValidationConfig(
        str(tmp_path / "val"), resize=(32, 32), base=("u:cat",), novel=("u:bag", "u:tree")
    )
    return larvseg_config(tmp_path, tmp_path / "runs", validation=validation)


def look(config):
    return survey(config, torch.device("cpu"), 2, None)


def test_the_overview_says_what_the_sources_are(config):
    found = look(config)
    assert found.title.startswith("run: larvseg on ") and "of 10 images in 5 slots" in found.title
    masks, weak, validation = (dataclasses.replace(row, path="", fingerprint="")
                               for row in found.data)  # fmt: skip
    assert masks == DataSet("masks", "", "masks", 2, 4, 2, "3 x 2 images", "32 x 32", "")
    assert weak == DataSet("weak", "", "labels", 3, 4, 2, "2 x 2 images", "32 x 32", "")
    assert (validation.teaches, validation.num_images) == ("validation", 1)
    assert found.facts["classes"] == "4, 4 of them scored: 1 base, 2 novel"
    assert found.facts["machine"].startswith("2 workers on cpu (local)")
    assert found.facts["starts"] == "at step 0"


def test_classes_that_nothing_teaches_are_named(config):
    (warning,) = [text for text in look(config).warnings if "neither" in text]
    assert "1 of the 4 scored classes have" in warning and ": tree. " in warning
    assert warning.endswith(" --validation.exclude u:tree")
    exclude = dataclasses.replace(config.validation, exclude=("u:tree",), novel=("u:bag",))
    (warning,) = [
        text
        for text in look(dataclasses.replace(config, validation=exclude)).warnings
        if "neither" in text
    ]
    assert warning.startswith("1 more classes of the sources' vocabularies") and "tree" in warning


def test_a_background_that_no_label_names_is_warned_of(config):
    (warning,) = [text for text in look(config).warnings if "pixels" in text]
    assert "(weak) names 'background', which has 70% of the masks' pixels." in warning
    assert "--sources.N.exclude u:background" in warning

    def warnings(**changes):
        one, two = config.sources
        sources = (dataclasses.replace(one, **changes), two)
        found = look(dataclasses.replace(config, sources=sources)).warnings
        return [text for text in found if "pixels" in text]

    assert warnings(exclude=("u:background",)) == []
    split = config.sources[0].path + "/one.txt"
    with open(split, "w") as file:
        file.write("b\n")
    assert "'background', which has 60% of" in warnings(split=split)[0]
    other = dataclasses.replace(config, method=SegmentConfig())  # does not read labels that way
    assert not any("pixels" in text for text in look(other).warnings)


def test_a_background_of_two_uids_is_told_from_one_that_no_label_names(config, tmp_path):
    other = [Category("bg", "Background"), *(Category(f"u:{name}", name) for name in NAMES[1:])]
    shutil.rmtree(tmp_path / "weak")
    write(tmp_path / "weak", {"c": ((CAT,), None), "d": ((BACKGROUND, CAT), None)})
    Vocabulary(tuple(other)).save(tmp_path / "weak" / "vocabulary.json")
    (warning,) = [text for text in look(config).warnings if "pixels" in text]
    assert "its uid is 'u:background'; they name 'bg', another class of this name" in warning


def test_a_fingerprint_follows_the_data_and_not_the_place(tmp_path):
    for name, labels in (("one", (CAT,)), ("same", (CAT,)), ("other", (BAG,))):
        write(tmp_path / name, {"a": (labels, None)})
    one, same, other = (
        Index.open(tmp_path / name).fingerprint() for name in ("one", "same", "other")
    )
    assert one == same != other and len(one) == 16
