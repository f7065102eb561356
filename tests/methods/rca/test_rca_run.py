"""RCA as a run: the same at any number of workers, resumed at another, and used without memory."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from memory.digest import digest_of
from train.shards import SIZE, larvseg_config, write_squares
from train.test_loop import Here, Watching, losses

from memseg_dist import dist
from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.config import EngineConfig, RunConfig, from_json, to_json
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.loader import Source
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.platforms.on_deepspeed import DeepSpeedEngine
from memseg_dist.tools.pictures.draw import draw_validation
from memseg_dist.train import loop
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.engine import TorchEngine
from memseg_dist.train.load_model import load_model
from memseg_dist.train.platform import Tracker

AUGMENT = AugmentConfig(
    (SIZE, SIZE), (1.0, 1.5), SIZE, keep_ratio=False, photometric=False, category_max_ratio=1.0
)
METHOD = RCAConfig(contrast_weight=0.2, gate=0.45, num_prototypes=2, map_size=8)
NUM_STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("squares")
    write_squares(root / "weak", 20, 4, with_masks=False)
    write_squares(root / "val", 3, 4, with_masks=True)
    return root


def rca_config(data: Path, storage: Path, **changes) -> RunConfig:
    """5 slots of 2 images, so that 2, 3 and 4 workers share them unevenly; epochs of 2 steps."""
    config = larvseg_config(data, storage)
    validation = dataclasses.replace(config.validation, base=(), novel=())
    options = {
        "sources": (Source("weak", str(data / "weak"), "labels", 5, 2, AUGMENT),),
        "method": METHOD,
        "engine": EngineConfig("torch"),
        "steps": NUM_STEPS,
        "validation": validation,
    }
    return dataclasses.replace(config, **options | changes)


def run(config_json: str, stop_at: int | None = None) -> dict:
    config = from_json(config_json)
    methods = []
    factory = TorchEngine if config.engine.kind == "torch" else DeepSpeedEngine

    def watched(method, config, device):
        methods.append(method)
        return factory(method, config, device)

    result = loop.train(config, Here(stop_at), Tracker(), watched)
    bank, maps = methods[0].memory, methods[0].accumulated.rows
    return {
        "status": result["status"],
        "digest": digest_of(bank, values=True),
        "rows": _of_all_ranks(bank.rows),
        "maps": _of_all_ranks(maps.rows),
        "prototypes": methods[0].net.prototypes.vectors,
        "classes": methods[0].net.prototypes.classes,
        "checkpoint": result["checkpoint"],
        "owned": len(bank.owned),
    }


def _of_all_ranks(part: torch.Tensor) -> torch.Tensor:
    counts = dist.all_gather(torch.tensor([len(part)])).flatten().tolist()
    return dist.all_gather_ragged(part, counts)


def assert_same(found: dict, wanted: dict) -> None:
    assert found["digest"] == wanted["digest"]
    for part in ("rows", "prototypes", "classes", "maps"):
        assert torch.equal(found[part], wanted[part]), part


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, process_pool):
    config = rca_config(data, tmp_path_factory.mktemp("whole"))
    return config, process_pool(1).run(run, to_json(config))[0]


def test_a_run_fills_memory_maps_and_prototypes(whole):
    config, result = whole
    assert result["rows"].abs().sum(dim=1).gt(0).float().mean() > 0.8
    assert result["maps"].amax(dim=(1, 2)).gt(0).float().mean() > 0.8
    assert set(result["classes"].tolist()) == {0, 1, 2, 3}
    lines = losses(config)
    assert "loss/weak/contrast" in lines[8] and lines[8]["loss/weak/contrast"] > 0


def test_rows_maps_and_prototypes_are_those_of_one_worker_on_four_after_a_resume_on_two(
    whole, tmp_path, process_pool
):
    """Bit by bit, under the other engine too: what is remembered, its clusters, the losses."""
    config, wanted = whole
    other = dataclasses.replace(config, storage=str(tmp_path), engine=EngineConfig("deepspeed"))
    assert process_pool(2).run(run, to_json(other), 1)[0]["status"] == "stopped"
    for found in process_pool(4).run(run, to_json(other)):
        assert_same(found, wanted)
    assert losses(other) == losses(config)


def test_the_slot_scope_needs_no_preview(whole, tmp_path, process_pool):
    config, _ = whole
    method = dataclasses.replace(METHOD, mixup_scope="slot")
    narrow = dataclasses.replace(config, storage=str(tmp_path / "1"), method=method)
    wanted = process_pool(1).run(run, to_json(narrow))[0]
    other = dataclasses.replace(narrow, storage=str(tmp_path / "2"))
    for found in process_pool(2).run(run, to_json(other)):
        assert_same(found, wanted)


def test_a_checkpoint_is_used_without_its_memories(whole, tmp_path):
    result = whole[1]
    copy = tmp_path / "published"
    shutil.copytree(result["checkpoint"], copy)
    for path in copy.glob("memory-*"):
        path.unlink()
    alone = load_model(Checkpoint(str(copy)), torch.device("cpu")).method.eval()
    assert alone.memory is None
    torch.testing.assert_close(alone.net.prototypes.vectors, result["prototypes"])
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    classes = torch.arange(4)
    trained = load_model(
        Checkpoint(result["checkpoint"]), torch.device("cpu"), with_memories=True
    ).method.eval()
    with torch.no_grad():
        expected = trained.predict(images, classes).dense()
        torch.testing.assert_close(alone.predict(images, classes).dense(), expected)


def test_images_that_changed_are_refused_on_resume(data, whole, tmp_path, monkeypatch):
    config, _ = whole
    storage = tmp_path / "runs"
    shutil.copytree(config.storage, storage, ignore=shutil.ignore_patterns("cache"))
    write_squares(tmp_path / "weak", 24, 4, with_masks=False)
    source = dataclasses.replace(config.sources[0], path=str(tmp_path / "weak"))
    changed = dataclasses.replace(
        config, storage=str(storage), sources=(source,), steps=config.steps
    )
    with pytest.raises(ValueError, match="was written with other data of weak"):
        run(to_json(changed))
    monkeypatch.setattr(Checkpoint, "data", {})  # an earlier version's
    with pytest.raises(ValueError, match="labels of a source, or the capacity have changed"):
        run(to_json(changed))


def test_sources_without_image_labels_are_refused(data, tmp_path):
    source = Source("weak", str(data / "val"), "masks", 5, 2)
    with pytest.raises(ValueError, match="supervision 'masks'; RCA learns from image labels"):
        run(to_json(rca_config(data, tmp_path, sources=(source,))))
    everything = ("n0", "n1", "n2", "n3")
    source = Source("weak", str(data / "weak"), "labels", 5, 2, exclude=everything)
    with pytest.raises(ValueError, match=r"no image of the sources .* has a label"):
        run(to_json(rca_config(data, tmp_path, sources=(source,), validation=None)))
    source = dataclasses.replace(source, exclude=("n9",))
    with pytest.raises(ValueError, match=r"exclude: .*'n9'"):
        run(to_json(rca_config(data, tmp_path, sources=(source,), validation=None)))


def test_what_would_fail_late_fails_before_the_first_step(data, tmp_path):
    weak = Source("weak", str(data / "weak"), "labels", 5, 2, exclude=("n3",))
    with pytest.raises(ValueError, match=r"has the classes \['n3'\], which no source labels"):
        run(to_json(rca_config(data, tmp_path, sources=(weak,))))
    with pytest.raises(ValueError, match=r"steps is 2, but an epoch takes 2: maps are accumulated"):
        run(to_json(rca_config(data, tmp_path, steps=2)))
    method = dataclasses.replace(METHOD, saliency_weight=1.0)
    with pytest.raises(ValueError, match=r"'weak' has no saliency maps, which method.saliency_w"):
        run(to_json(rca_config(data, tmp_path, method=method)))
    for changes in (
        {"augment": dataclasses.replace(AUGMENT, rotate=10.0)},
        {"swap_on_flip": (("n0", "n1"),)},
    ):
        source = Source(
            "weak", str(data / "weak"), "labels", 5, 2, **{"augment": AUGMENT} | changes
        )
        with pytest.raises(ValueError, match=r"'weak' has augment.rotate .* use neither"):
            run(to_json(rca_config(data, tmp_path, sources=(source,))))
    twice = tuple(
        Source(name, str(data / "weak"), "labels", 2, 2, AUGMENT) for name in ("one", "two")
    )
    with pytest.raises(ValueError, match=r"source 'two' .* the image key 's00.*' occurs twice"):
        run(to_json(rca_config(data, tmp_path, sources=twice)))


def test_a_contrast_that_would_never_be_on_is_refused(data, tmp_path):
    method = dataclasses.replace(METHOD, warmup_epochs=NUM_STEPS // 2)
    config = rca_config(data, tmp_path, method=method)
    with pytest.raises(ValueError, match=r"steps is 8, but method.warmup_epochs 4 are 8 steps"):
        build_method(config, build_label_space(config))


def test_more_prototypes_than_rows_and_a_gate_that_nothing_passes(data, tmp_path):
    method = dataclasses.replace(METHOD, num_prototypes=50)
    result = run(to_json(rca_config(data, tmp_path / "many", method=method)))
    num_set = int(result["rows"].abs().sum(dim=1).gt(0).sum())
    assert len(result["prototypes"]) == num_set  # every row its own prototype
    method = dataclasses.replace(METHOD, gate=1.0)
    config = rca_config(data, tmp_path / "none", method=method)
    result = run(to_json(config))
    assert len(result["prototypes"]) == 0 and not result["rows"].any()
    assert losses(config)[8]["loss/weak/contrast"] == 0


def test_pictures_of_maps_and_charts_reach_the_tracker(data, tmp_path):
    config = rca_config(data, tmp_path)
    tracker = Watching()
    loop.train(config, Here(), tracker, TorchEngine, draw_validation)
    names = {name for name, _, _ in tracker.images}
    assert any(name.startswith("panels/") for name in names)
    assert any("rows set per class" in name for name in names), names
    assert any("rows per prototype" in name for name in names), names
    assert "class vectors/similarity" in names, names
