"""Scenes: the class list, purity of every picture, and what each split may and may not know."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import LabelSpace, Vocabulary

SPLITS = ("masks", "weak", "objects", "val")


@pytest.fixture(scope="session")
def scenes(load_recipe):
    return load_recipe("scenes")


@pytest.fixture
def config(scenes, tmp_path):
    counts = dict.fromkeys(SPLITS, 12)
    return scenes.Scenes(tmp_path / "scenes", size=48, **counts, samples_per_shard=5, processes=0)


@pytest.fixture
def built(scenes, config):
    scenes.build(config)
    return config


def test_class_list_is_stable_and_unique_for_any_number(scenes):
    many = scenes.class_uids(700)
    assert len(set(many)) == 8 + 700
    assert many[: 8 + 24] == scenes.class_uids(24)
    assert many[:2] == ["scenes:stuff-grain", "scenes:stuff-clouds"]
    assert many[8:10] == ["scenes:disc-weave", "scenes:square-rungs"]


def test_a_third_of_the_objects_is_novel(scenes):
    base, novel = scenes.base_and_novel(24)
    assert (len(base), len(novel)) == (24, 8)
    assert not set(base) & set(novel)
    assert set(base) | set(novel) == set(scenes.class_uids(24))
    assert not any("stuff" in uid for uid in novel)


@pytest.mark.parametrize("split", SPLITS)
def test_a_picture_does_not_depend_on_how_many_are_drawn(scenes, config, split):
    one = scenes.draw(config, split, 7)
    other = scenes.draw(dataclasses.replace(config, **{split: 1000}, processes=2), split, 7)
    assert np.array_equal(one.image, other.image) and np.array_equal(one.truth, other.truth)
    assert not np.array_equal(one.image, scenes.draw(config, split, 8).image)
    reseeded = dataclasses.replace(config, seed=1)
    assert not np.array_equal(one.image, scenes.draw(reseeded, split, 7).image)


@pytest.mark.parametrize("size", [32, 97, 160])
def test_any_size(scenes, config, size):
    for split in SPLITS:
        picture = scenes.draw(dataclasses.replace(config, size=size), split, 0)
        assert picture.image.shape == (size, size, 3) and picture.truth.shape == (size, size)


def test_procedural_classes_draw_visible_objects(scenes, config):
    wide = dataclasses.replace(config, size=64, num_objects=400)
    for index in range(144, 400, 7):
        picture = scenes.draw(wide, "objects", index)
        assert picture.labels == (8 + index,)
        assert (picture.truth == 8 + index).mean() > 0.01


def test_colours_say_nothing(scenes, config):
    """Mean colours of one class's instances spread as widely as those of different classes."""
    means: dict[int, list[np.ndarray]] = {}
    for index in range(240):
        picture = scenes.draw(config, "objects", index)
        label = picture.labels[0]
        means.setdefault(label, []).append(picture.image[picture.truth == label].mean(axis=0))
    within = np.mean([np.var(colours, axis=0) for colours in means.values()])
    total = np.var(np.concatenate(list(means.values())), axis=0).mean()
    assert within > 0.8 * total


def test_objects_are_seen_with_their_home_and_partner(scenes, config):
    def rates(cooccurrence: float) -> tuple[float, float]:
        chosen = dataclasses.replace(config, cooccurrence=cooccurrence)
        home = partner = total = 0
        for index in range(150):
            seen = set(scenes.draw(chosen, "weak", index).labels)
            for which in [label - 8 for label in seen if label >= 8]:
                total += 1
                home += scenes.home_stuff(which) in seen
                partner += 8 + scenes.partner(which, 24) in seen
        return home / total, partner / total

    strong, weak = rates(0.9), rates(0.0)
    assert strong[0] > weak[0] + 0.15 and strong[1] > weak[1] + 0.15


def test_splits_hold_what_they_promise(scenes, built, read_back):
    base, novel = scenes.base_and_novel(built.num_objects)
    vocabularies = {s: Vocabulary.load(built.root / s / "vocabulary.json") for s in SPLITS}
    assert list(vocabularies["masks"].uids) == base
    assert list(vocabularies["weak"].uids) == scenes.class_uids(built.num_objects)
    assert list(vocabularies["val"].uids) == scenes.class_uids(built.num_objects)
    assert list(vocabularies["objects"].uids) == scenes.class_uids(built.num_objects)[8:]
    assert len(LabelSpace.union(vocabularies)) == 32
    content = {split: read_back(built.root / split) for split in SPLITS}
    for split in SPLITS:
        assert len(Index.open(built.root / split)) == 12
        assert len(content[split]) == 12
    assert all(mask is None for _, _, mask in content["weak"].values())
    assert all(len(labels) >= 2 for _, labels, _ in content["weak"].values())
    assert [labels for _, labels, _ in content["objects"].values()] == [[i] for i in range(12)]
    assert all((mask != 65535).all() for _, _, mask in content["val"].values())
    for index in range(12):
        truth = scenes.draw(built, "masks", index).truth
        mask = content["masks"][f"masks{index:08d}"][2]
        is_novel = np.isin(truth, [scenes.class_uids(24).index(uid) for uid in novel])
        assert np.array_equal(mask == 65535, is_novel)
        uids = np.array(base)[mask[~is_novel]]
        assert np.array_equal(uids, np.array(scenes.class_uids(24))[truth[~is_novel]])


def test_the_command_line_in_parallel_writes_the_same_bytes(scenes, built, tmp_path):
    root = tmp_path / "parallel"
    counts = [part for split in SPLITS for part in (f"--{split}", "12")]
    command = [sys.executable, scenes.__file__, "--root", str(root), "--size", "48", *counts]
    options = ["--samples-per-shard", "5", "--processes", "2", "--preview", str(root / "p.png")]
    subprocess.run([*command, *options], check=True, cwd=Path(scenes.__file__).parents[1])
    for path in sorted(built.root.rglob("*.tar")):
        assert path.read_bytes() == (root / path.relative_to(built.root)).read_bytes()
    with Image.open(root / "p.png") as sheet:
        assert sheet.size == (8 * 48, 4 * 4 * 48)


def test_a_killed_build_goes_on(scenes, built):
    """Whole splits are left alone, a missing one is drawn again with the same bytes."""
    kept = built.root / "masks" / "shard-000000.tar"
    before = kept.stat().st_mtime_ns
    weak = built.root / "weak"
    bytes_before = (weak / "shard-000001.tar").read_bytes()
    for path in weak.iterdir():
        path.unlink()
    scenes.build(built)
    assert kept.stat().st_mtime_ns == before
    assert (weak / "shard-000001.tar").read_bytes() == bytes_before


def test_other_settings_in_one_folder_are_refused(scenes, built):
    with pytest.raises(ValueError, match=r"cooccurrence.*name another --root"):
        scenes.build(dataclasses.replace(built, cooccurrence=0.1))
    assert json.loads((built.root / "scenes.json").read_text())["cooccurrence"] == 0.6


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 8}, "--size 8"),
        ({"num_objects": 2}, "--num-objects 2"),
        ({"cooccurrence": 1.5}, "--cooccurrence 1.5"),
        ({"val": 0}, "--val 0"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0"),
    ],
)
def test_wrong_settings_name_the_flag(config, change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(config, **change)
