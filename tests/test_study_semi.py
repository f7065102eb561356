"""What the runs of benchmarks/study_semi.py are: the same budget, and results that others need."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from memseg_dist.config import RunConfig
from memseg_dist.stages import LabelConfig, resolved


@pytest.fixture
def semi(monkeypatch):
    root = Path(__file__).resolve().parents[1]
    for folder in ("benchmarks", "jobs"):
        monkeypatch.syspath_prepend(str(root / folder))
    return importlib.import_module("study_semi")


@pytest.fixture
def studies(semi, tmp_path):
    """Of scenes and of pictures."""
    scenes = semi.Study(storage=tmp_path, steps=7)
    return scenes, replace(scenes, pictures=Path("shards"), weights=Path("lite0.safetensors"))


def runs_of(stages):
    return [stage for stage in stages.values() if isinstance(stage, RunConfig)]


def test_every_network_has_the_same_budget(semi, studies):
    for study in studies:
        for name in study.names:
            for run in runs_of(semi.stages_of(study, "1/16", name, 3)):
                few = run.sources[0]
                assert (run.steps, run.seed, few.split) == (7, 3, "1_16-study3")
                assert {(s.slots, s.batch_per_slot) for s in run.sources} == {(1, 4)}
                assert {s.supervision for s in run.sources[1:]} <= {"none", "labels", "masks"}
                assert all(s.split is None for s in run.sources[1:])
                assert run.launch.workers == 1 and run.tracking.kind == "none"
            assert len(runs_of(semi.stages_of(study, "1/16", name, 3))) >= 1


def test_rows_have_directories_of_their_own_but_what_they_share(semi, studies):
    """Self-training starts from the supervised network, and every third stage from stage 2."""
    for study in studies:
        of = {name: resolved(semi.stages_of(study, "1/4", name, 0)) for name in study.names}
        last = [runs_of(stages)[-1].directory for stages in of.values()]
        assert len(set(last)) == len(last)
        offline = of["self-training"]
        assert offline["teacher"] == of["supervised"]["train"]
        assert offline["labels"].checkpoint == of["supervised"]["train"].directory
        assert offline["student"].sources[1].path == offline["labels"].out
        first, second = of["stage 1"]["labels1"], of["stage 2"]["labels2"]
        assert {s.pseudo_masks for s in of["stage 2"]["stage2"].sources} == {first.out}
        for name in set(study.names) & set(semi.THIRD_STAGES):
            (third,) = runs_of(of[name])
            assert {s.pseudo_masks for s in third.sources} == {second.out}
            for key, value in semi.THIRD_STAGES[name].items():
                assert getattr(third.method, key) == value


def test_labels_are_of_all_pixels_but_offline_self_trainings(semi, studies):
    for study in studies:
        for name, threshold in (("stage 1", 0.0), ("stage 2", 0.0), ("self-training", 0.5)):
            stages = semi.stages_of(study, "1/16", name, 0)
            (labels,) = [stage for stage in stages.values() if isinstance(stage, LabelConfig)]
            assert labels.labeller.threshold == threshold and labels.truth == study.train_shards
            assert not labels.labeller.restrict_to_labels and labels.data == study.train_shards


def test_all_masks_are_a_supervised_network_of_each_kind(semi, studies):
    for name in ("supervised", "stage 1"):
        stages = semi.stages_of(studies[1], semi.ALL, name, 0)
        (run,) = stages.values()
        assert run.sources[0].split is None and len(run.sources) == 1


def test_what_is_compared_is_run_and_comes_before(semi):
    order = [name for phase in semi.PHASES for name in phase]
    assert sorted(order) == sorted(semi.SCENES)
    for variant, others in semi.COMPARED.items():
        assert {variant, *others} <= set(order)
    assert order.index("supervised") < order.index("self-training")
    assert order.index("stage 1") < order.index("stage 2") < order.index("stage 3")


def test_rows_of_a_share_lose_its_name(semi):
    names = ("1/16 stage 3, no EMA", "1/4 stage 1")
    rows = [{"variant": name, "seed": seed} for name in names for seed in (0, 1)]
    assert semi.of_share(rows, "1/16", [0]) == [{"variant": "stage 3, no EMA", "seed": 0}]
