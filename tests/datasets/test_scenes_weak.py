"""Scenes for image labels alone: the same pictures, stuff as background, and maps to believe."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source, TrainLoader
from memseg_dist.data.vocabulary import LabelSpace, Vocabulary


@pytest.fixture(scope="session")
def weak(load_recipe):
    return load_recipe("scenes_weak")


@pytest.fixture
def config(weak, tmp_path):
    root = tmp_path / "weak"
    return weak.ScenesWeak(root, 48, train=12, val=7, samples_per_shard=5, processes=0)


@pytest.fixture
def built(weak, config):
    config = dataclasses.replace(config, saliency=True)
    weak.build(config)
    return config


def test_pictures_are_those_of_the_scenes(weak, config):
    uids = weak.scenes.class_uids(24)
    ours = weak.vocabulary(24)
    assert ours.uids == ("background", *uids[8:])
    for split, theirs in (("train", "weak"), ("val", "val")):
        for index in range(20):
            picture = weak.draw(config, split, index)
            drawn = weak.scenes.draw(config.scenes, theirs, index)
            assert np.array_equal(picture.image, drawn.image)
            assert np.array_equal(picture.truth == 0, drawn.truth < 8)
            assert [ours.uids[i] for i in picture.labels] == [uids[i] for i in drawn.labels
                                                              if i >= 8]  # fmt: skip
            known = np.isin(picture.truth, picture.labels)
            assert np.array_equal(picture.truth[known] + 7, drawn.truth[known])
            unknown = picture.truth == 65535
            assert (known | unknown | (picture.truth == 0)).all()
            assert unknown.sum() < 3 * max(4, 0.004 * 48**2)
    more = dataclasses.replace(config, train=1000, processes=2)
    again = weak.draw(more, "train", 3)
    assert np.array_equal(again.truth, weak.draw(config, "train", 3).truth)


def test_what_is_written(weak, built, read_back, capsys):
    vocabularies = {s: Vocabulary.load(built.root / s / "vocabulary.json") for s in weak.SPLITS}
    assert all(item == weak.vocabulary(24) for item in vocabularies.values())
    for split, count in (("train", 12), ("val", 7)):
        content = read_back(built.root / split)
        assert len(content) == len(Index.open(built.root / split)) == count
        for index in range(count):
            picture = weak.draw(built, split, index)
            _, labels, mask = content[picture.key]
            assert np.array_equal(mask, picture.truth)
            assert labels == [0, *picture.labels] and picture.labels
    maps = sorted((built.root / "saliency").iterdir())
    assert [path.stem for path in maps] == [f"train{index:08d}" for index in range(12)]


def test_maps_are_like_the_truth_but_not_it(weak, config):
    config = dataclasses.replace(config, size=96)
    inside, outside, missed, mistaken = [], [], 0, 0
    for index in range(120):
        truth = weak.draw(config, "train", index).truth
        found = weak.draw_saliency(config, index, truth)
        assert found.dtype == np.uint8 and found.shape == truth.shape
        inside.append(found[truth > 0].mean())
        outside.append(found[truth == 0].mean())
        missed += any(found[truth == i].mean() < 64 for i in np.unique(truth[truth > 0]))
        mistaken += (found[truth == 0] > 100).mean() > 0.03
        assert np.array_equal(found, weak.draw_saliency(config, index, truth))
    assert 130 < np.mean(inside) < 210 and np.mean(outside) < 30
    assert 12 < missed < 60 and 5 < mistaken < 70


def test_a_source_reads_labels_and_maps(built, cache):
    root, size = built.root, built.size
    plain = AugmentConfig(
        (size, size), (1.0, 1.0), size, 0.0, photometric=False, category_max_ratio=1.0
    )
    source = Source("train", str(root / "train"), "labels", 1, 12, plain, hide_mask=True,
                    exclude=("background",), saliency=str(root / "saliency"))  # fmt: skip
    space = LabelSpace.union({"train": Vocabulary.load(root / "train" / "vocabulary.json")})
    ((batch, _),) = next(TrainLoader([source], space, seed=0).steps(0, 1))
    assert batch.masks is None and all(labels and 0 not in labels for labels in batch.labels)
    for key, found in zip(batch.keys, batch.saliency, strict=True):
        stored = np.array(Image.open(root / "saliency" / f"{key}.png"))
        assert torch.equal(found, torch.from_numpy(stored).float() / 255)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSEG_CACHE", str(tmp_path / "cache"))


def test_the_command_line_in_parallel_writes_the_same_bytes(weak, built, tmp_path):
    root = tmp_path / "parallel"
    command = [sys.executable, weak.__file__, "--root", str(root), "--size", "48", "--train", "12"]
    options = ["--val", "7", "--samples-per-shard", "5", "--processes", "2", "--saliency"]
    sheet = ["--preview", str(root / "p.png")]
    done = subprocess.run(
        [*command, *options, *sheet], capture_output=True, text=True, check=True,
        cwd=Path(weak.__file__).parents[1],
    )  # fmt: skip
    assert "train: 12 pictures written, 0 without an object" in done.stdout
    files = [*built.root.rglob("*.tar"), *built.root.rglob("*.png")]
    assert len(files) == 3 + 2 + 12
    for path in files:
        assert path.read_bytes() == (root / path.relative_to(built.root)).read_bytes()
    with Image.open(root / "p.png") as image:
        assert image.size == (10 * 48, 9 * 48)


def test_maps_can_be_added_and_a_killed_build_goes_on(weak, config, built):
    kept = built.root / "train" / "shard-000000.tar"
    before = kept.stat().st_mtime_ns
    lost = built.root / "saliency" / "train00000007.png"
    content = lost.read_bytes()
    lost.unlink()
    weak.build(config)  # without maps
    assert not lost.exists()
    weak.build(built)
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"train.*name another --root"):
        weak.build(dataclasses.replace(config, train=13))


@pytest.mark.parametrize(
    ("change", "text"),
    [({"size": 8}, "--size 8"), ({"train": 0}, "--train 0"), ({"val": 0}, "--val 0")],
)
def test_wrong_settings_name_the_flag(config, change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(config, **change)
