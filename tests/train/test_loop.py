"""The loop end to end, on LarvSeg with its bank: promises 1 and 2, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory.digest import digest_of
from train.shards import larvseg_config, write_squares

from memseg_dist import dist
from memseg_dist.assemble import build_label_space
from memseg_dist.config import EngineConfig, RunConfig, from_json, to_json
from memseg_dist.data.source import Source
from memseg_dist.methods.larvseg.method import LarvSeg
from memseg_dist.platforms.on_deepspeed import DeepSpeedEngine
from memseg_dist.tools.pictures.draw import draw_validation
from memseg_dist.train import loop
from memseg_dist.train.checkpoint import Checkpoint, latest
from memseg_dist.train.engine import TorchEngine
from memseg_dist.train.platform import Tracker


class Here:
    """A context without a launcher. stop_at: answer to the n-th question whether to stop."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rank, self.size, self.device = dist.rank(), dist.size(), torch.device("cpu")
        self._questions, self._stop_at = 0, stop_at

    def report(self, metrics, checkpoint=None) -> None:
        pass

    def should_stop(self) -> bool:
        self._questions += 1
        return self._questions == self._stop_at


class Watching(Tracker):
    def __init__(self) -> None:
        self.images, self.texts, self.status = [], {}, ""

    def log_image(self, name, image, step) -> None:
        self.images.append((name, image.shape, step))

    def log_text(self, name, text) -> None:
        self.texts[name] = text

    def finish(self, status) -> None:
        self.status = status


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("squares")
    write_squares(root / "masks", 20, 2, with_masks=True)
    write_squares(root / "weak", 20, 4, with_masks=False)
    write_squares(root / "val", 5, 4, with_masks=True)
    return root


def run(config_json: str, stop_at: int | None = None):
    """Train; per rank the result, the batches' keys by (step, slot), and the bank's digest."""
    config = from_json(config_json)
    factory = TorchEngine if config.engine.kind == "torch" else DeepSpeedEngine
    keys, methods = {}, []

    def watched(method, config, device):
        engine = factory(method, config, device)
        methods.append(method)
        return _Watched(engine, keys)

    result = loop.train(config, Here(stop_at), Tracker(), watched)
    memory = methods[0].state().get("memory")
    return result, keys, None if memory is None else digest_of(memory)


class _Watched:
    def __init__(self, engine, keys) -> None:
        self._engine, self._keys = engine, keys
        self.step, self.state, self.load = engine.step, engine.state, engine.load
        self.backward = engine.backward

    def __call__(self, batch, clock):
        pixels = int(batch.images.sum())
        if not clock.idle:
            self._keys[clock.step, clock.slot] = (batch.keys, batch.labels, pixels)
        return self._engine(batch, clock)


def history(config) -> list[dict]:
    lines = Path(config.directory, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(config) -> dict[int, dict[str, float]]:
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith("loss")}
        for line in history(config)
        if "loss" in line
    }


def test_a_source_without_slots_gives_only_its_classes(data, tmp_path):
    """Its shards are not even there; the run is the one without it."""
    changes = {"validation": None, "engine": EngineConfig("torch"), "steps": 2}
    config = larvseg_config(data, tmp_path / "alone", **changes)
    (tmp_path / "idle").mkdir()
    (tmp_path / "idle" / "vocabulary.json").write_bytes(
        (data / "val" / "vocabulary.json").read_bytes()
    )
    idle = Source("idle", str(tmp_path / "idle"), "masks", slots=0)
    sources = (idle, *config.sources)
    more = larvseg_config(data, tmp_path / "more", **changes, sources=sources)
    assert run(to_json(more))[1:] == run(to_json(config))[1:]
    assert losses(more) == losses(config)
    assert build_label_space(more).classes("idle").tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"sources is \['idle'\]; it must be at least one"):
        dataclasses.replace(more, sources=(idle,))


def all_keys(results) -> dict:
    merged: dict = {}
    for _, keys, _ in results:
        assert not merged.keys() & keys.keys()
        merged |= keys
    return merged


def assert_same_losses(found, wanted, tolerance=1e-5) -> None:
    assert found.keys() == wanted.keys()
    for step, line in wanted.items():
        assert found[step] == pytest.approx(line, rel=tolerance, abs=tolerance), step


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, process_pool):
    """The uninterrupted run of one worker: config, losses, keys, digest, result."""
    config = larvseg_config(data, tmp_path_factory.mktemp("whole"))
    results = process_pool(1).run(run, to_json(config))
    return config, losses(config), all_keys(results), results[0][2], results[0][0]


def test_a_run_ends_with_figures_of_losses_memory_and_validation(whole):
    config, _, keys, _, result = whole
    assert result["status"] == "finished" and result["step"] == 6
    assert len(keys) == 6 * 5
    assert 0 <= result["val/miou_all"] <= 100
    assert {"val/miou_base", "val/miou_novel", "val/pixel_accuracy"} <= result.keys()
    assert {"loss/masks/seg", "loss/weak/cls", "loss/weak/aux", "memory/fill"} <= result.keys()
    assert {"images_per_second", "data_wait_share", "step_seconds", "grad_norm"} <= result.keys()
    lines = history(config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert lines[0]["lr"] == 0.02 and lines[5]["memory/coverage"] == 1.0
    names = sorted(path.name for path in Path(config.directory, "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(
    "size, processes, engine",
    [
        (2, 0, EngineConfig("deepspeed", zero_stage=2)),
        (3, 0, EngineConfig("deepspeed", zero_stage=1)),
        (4, 0, EngineConfig("torch")),
        (1, 2, EngineConfig("deepspeed", zero_stage=0)),
    ],
)
def test_promise_1_any_cluster_same_run(whole, process_pool, tmp_path, size, processes, engine):
    config, wanted, keys, digest, _ = whole
    other = dataclasses.replace(
        config,
        storage=str(tmp_path),
        engine=engine,
        validation=None,
        loader=dataclasses.replace(config.loader, processes=processes),
    )
    results = process_pool(size).run(run, to_json(other))
    assert all_keys(results) == keys
    assert {result[2] for result in results} == {digest}
    found = losses(other)
    assert_same_losses(found, {step: wanted[step] for step in found})


def test_promise_2_resume_at_other_sizes(whole, process_pool, tmp_path):
    config, wanted, keys, digest, final = whole
    moved = dataclasses.replace(config, storage=str(tmp_path))
    first = process_pool(2).run(run, to_json(moved), 2)
    assert first[0][0]["status"] == "stopped" and first[0][0]["step"] == 2
    zero2 = dataclasses.replace(moved, engine=EngineConfig("torch"))
    second = process_pool(1).run(run, to_json(zero2), 2)
    third = process_pool(3).run(run, to_json(moved))
    assert third[0][0]["status"] == "finished"
    assert all_keys([*first, *second, *third]) == keys  # none lost, none seen twice
    assert_same_losses(losses(moved), wanted)
    assert {result[2] for result in third} == {digest}
    assert third[0][0]["val/miou_all"] == pytest.approx(final["val/miou_all"], abs=1e-3)


KILLED = """
import importlib, os, signal, sys
from pathlib import Path
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "tests")]
import torch
from memseg_dist.config import from_json
from memseg_dist.train.platform import Tracker
from memseg_dist.platforms.on_deepspeed import DeepSpeedEngine
from memseg_dist.tools.pictures.draw import draw_validation
from memseg_dist.train.loop import train
from train.test_loop import Here

class Killed(Tracker):
    def log_metrics(self, metrics, step):
        if step == int(sys.argv[2]) and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGKILL)

    def log_image(self, name, image, step):
        if int(sys.argv[2]) == -1:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
importlib.import_module(sys.argv[3])  # the method's, which may be one of a test
config = from_json(Path(sys.argv[1]).read_text())
train(config, Here(), Killed(), DeepSpeedEngine, draw_validation)
"""


def run_until_killed(config: RunConfig, *steps: int) -> None:
    """In processes that die by SIGKILL at a step, or at -1 within the evaluation; 0: never."""
    file = Path(config.storage) / "config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_json(config))
    for step in steps:
        method = type(config.method).__module__
        arguments = [sys.executable, "-c", KILLED, str(file), str(step), method]
        code = subprocess.run(arguments, timeout=120).returncode
        assert code == (-signal.SIGKILL if step else 0)


def assert_same_checkpoints(mine: RunConfig, other: RunConfig) -> None:
    """Every file of the last one, bit for bit."""
    ours, theirs = (Checkpoint(latest(f"{c.directory}/checkpoints")) for c in (mine, other))
    assert ours.step == theirs.step == 6
    for name, entry in theirs.manifest.files.items():
        if name != "run.json":  # which holds the storage path
            assert ours.manifest.files[name].sha256 == entry.sha256, name


def test_sigkill_and_resume_is_bitwise_at_the_same_size(whole, tmp_path):
    config, wanted, *_ = whole
    mine = dataclasses.replace(config, storage=str(tmp_path), engine=config.engine)
    # at step 5, which is after a checkpoint; then within the last evaluation; then not at all
    run_until_killed(mine, 5, -1, 0)
    assert losses(mine) == wanted  # exactly
    assert [line["step"] for line in history(mine)] == [
        1,
        2,
        3,
        4,
        5,
        6,
        6,
    ]  # none lost, none twice
    assert history(mine)[-1] == history(config)[-1]  # the evaluation
    assert_same_checkpoints(mine, config)


def test_a_finished_run_is_not_trained_or_evaluated_again(whole, process_pool):
    config, _, _, _, final = whole
    before = history(config)
    ((again, keys, _),) = process_pool(1).run(run, to_json(config))
    assert keys == {} and again["val/miou_all"] == final["val/miou_all"]
    assert history(config) == before


def test_panels_table_and_status_reach_the_tracker(whole, data, tmp_path):
    config = larvseg_config(data, tmp_path, steps=1, engine=EngineConfig("torch"))
    tracker = Watching()
    loop.train(config, Here(), tracker, TorchEngine, draw_validation)
    assert tracker.status == "finished"
    names = [(name, step) for name, _, step in tracker.images]
    assert names == [
        ("panels/00", 1),
        ("charts/memory/rows per class", 1),
        ("class vectors/similarity", 1),
        ("class vectors/embedding", 1),
    ]
    assert "novel" in tracker.texts["validation/step-00000001.csv"]
    assert from_json(tracker.texts["config.json"]) == config


def test_a_run_that_fails_before_its_first_step_says_what_it_was(data, tmp_path):
    def fail(*_):
        raise RuntimeError("no such engine")

    config, tracker = larvseg_config(data, tmp_path, steps=1), Watching()
    with pytest.raises(RuntimeError, match="no such engine"):
        loop.train(config, Here(), tracker, fail)
    assert tracker.status == "failed" and from_json(tracker.texts["config.json"]) == config
    (text,) = [text for name, text in tracker.texts.items() if name.startswith("errors/")]
    assert text.endswith("RuntimeError: no such engine\n")


def torch_run(data, storage, **changes):
    defaults = {"engine": EngineConfig("torch"), "validation": None}
    config = larvseg_config(data, storage, **(defaults | changes))
    return loop.train(config, Here(), Tracker(), TorchEngine), config


def test_recomputed_activations_change_no_loss_and_write_no_memory_twice(data, tmp_path):
    kept, first = torch_run(data, tmp_path / "kept", steps=3)
    engine = EngineConfig("torch", activation_checkpointing=True)
    recomputed, second = torch_run(data, tmp_path / "recomputed", steps=3, engine=engine)
    assert_same_losses(losses(second), losses(first), 1e-6)
    assert recomputed["memory/fill"] == kept["memory/fill"]


def test_resume_never_and_must(data, tmp_path):
    with pytest.raises(ValueError, match=r"resume is 'must', but .* holds no whole checkpoint"):
        torch_run(data, tmp_path, resume="must")
    torch_run(data, tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"resume is 'never', but the run has the checkpoint"):
        torch_run(data, tmp_path, resume="never", steps=1)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data, tmp_path, capsys):
    _, config = torch_run(data, tmp_path)
    before = losses(config)
    folder = Path(config.directory, "checkpoints")
    files = [folder / f"step-0000000{step}" / "model.safetensors" for step in (6, 3)]
    whole = [file.read_bytes() for file in files]

    def flip(number: int) -> None:
        content = bytearray(whole[number])
        content[-3] ^= 1
        files[number].write_bytes(content)

    flip(0)
    result, _ = torch_run(data, tmp_path)
    output = capsys.readouterr().out
    assert f"WARNING: {files[0]} is damaged" in output
    assert f"the run goes back to {files[1].parent} and discards" in output
    assert result["step"] == 6 and losses(config) == before
    assert files[0].read_bytes() == whole[0]  # made again
    flip(0)
    flip(1)
    with pytest.raises(ValueError, match=r"no checkpoint of the run is as it was written \(.*6, "):
        torch_run(data, tmp_path)
    assert len(list(folder.glob("*/manifest.json"))) == 2  # nothing is discarded for nothing


def test_a_changed_config_is_refused_and_says_what_changed(data, tmp_path):
    torch_run(data, tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"another config.*seed: 5 -> 6.*another name"):
        torch_run(data, tmp_path, steps=1, seed=6)


def test_a_changed_vocabulary_is_refused(data, tmp_path):
    write_squares(tmp_path / "weak", 20, 4, with_masks=False)
    (tmp_path / "masks").symlink_to(data / "masks")
    torch_run(tmp_path, tmp_path / "out", steps=1)
    path = tmp_path / "weak" / "vocabulary.json"
    path.write_text(path.read_text().replace('"n3"', '"n9"'))
    with pytest.raises(ValueError, match=r"another label space.*\['n3', 'n9'\]"):
        torch_run(tmp_path, tmp_path / "out", steps=1)


def test_changed_data_is_refused(data, tmp_path, monkeypatch):
    write_squares(tmp_path / "weak", 16, 4, with_masks=False)
    (tmp_path / "masks").symlink_to(data / "masks")
    torch_run(tmp_path, tmp_path / "out", steps=1)
    shutil.copytree(tmp_path / "weak", tmp_path / "moved" / "weak")
    (tmp_path / "moved" / "masks").symlink_to(data / "masks")
    torch_run(tmp_path / "moved", tmp_path / "out", steps=1)  # another place is no other data
    write_squares(tmp_path / "weak", 20, 4, with_masks=False)
    with pytest.raises(ValueError, match=r"written with other data of weak \(.* another --name"):
        torch_run(tmp_path, tmp_path / "out", steps=1)
    monkeypatch.setattr(Checkpoint, "data", {})  # one of an earlier version
    torch_run(tmp_path, tmp_path / "out", steps=1)


def test_output_that_cannot_be_written_is_told_before_training(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*/file/run.*set `storage`"):
        torch_run(data, tmp_path / "file")


def test_a_loss_that_is_not_finite_names_step_and_source(data, tmp_path, monkeypatch):
    forward = LarvSeg.forward

    def broken(self, batch, clock):
        found = forward(self, batch, clock)
        factor = float("nan") if (clock.step, clock.slot) == (1, 4) else 1.0
        return {name: loss * factor for name, loss in found.items()}

    monkeypatch.setattr(LarvSeg, "forward", broken)
    with pytest.raises(
        ValueError, match=r"'(aux|cls)' of source 'weak' was nan at step 1 \(slot 4"
    ):
        torch_run(data, tmp_path)
    assert latest(str(tmp_path / "run" / "checkpoints")) is None


def test_no_value_is_read_from_the_device_within_a_step(data, tmp_path, monkeypatch):
    """Between logs nothing asks a tensor for its value: the device would be waited for."""
    asked: list[str] = []

    def forbid(name):
        original = getattr(torch.Tensor, name)

        def watched(self, *args):
            if _in_the_loop():
                asked.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)

    def _in_the_loop() -> bool:
        frame = sys._getframe()
        while frame := frame.f_back:
            if frame.f_code.co_name in ("read", "save", "evaluate"):
                return False
            if frame.f_code.co_filename.endswith(("train/engine.py", "train/meters.py")):
                return True
        return False

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        forbid(name)
    torch_run(
        data, tmp_path, every=dataclasses.replace(larvseg_config(data, tmp_path).every, log=3)
    )
    assert asked == []
