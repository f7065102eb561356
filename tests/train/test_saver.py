"""Checkpoints in the background: what is written is what was there, whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from train.test_checkpoint import LABELS, filled_bank, make_engine
from train.tiny import micro_batches, save, tiny_config

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.train import saver as saver_module
from memseg_dist.train.checkpoint import Checkpoint, latest
from memseg_dist.train.saver import Saver


def step_on(engine, bank) -> None:
    for batch, clock in micro_batches(1, dist.rank(), dist.size()):
        engine.backward(sum(engine(batch, clock).values()), clock)
    engine.step(0.1)
    bank.propose([1], torch.ones(1, 3), Clock(7))
    bank.commit(Clock(7))


def test_training_goes_on_while_the_files_are_written(tmp_path, monkeypatch):
    engine, bank = make_engine(), filled_bank()
    wanted, rows = dict(engine.state().weights), bank.rows.clone()
    earlier = save(str(tmp_path), 1, engine, {"memory": bank}, tiny_config(), LABELS, keep=3)
    may_write, may_commit = threading.Event(), threading.Event()
    for name, gate in (("write_tensors", may_write), ("rename", may_commit)):
        original = getattr(saver_module, name)

        def gated(*arguments, original=original, gate=gate):
            assert gate.wait(30)
            return original(*arguments)

        monkeypatch.setattr(saver_module, name, gated)

    saver = Saver(str(tmp_path), tiny_config(), LABELS, {}, keep=3)
    saver.start(2, engine, {"memory": bank})
    step_on(engine, bank)
    assert saver.settle() is None
    may_write.set()
    while saver.settle() is None and not list(tmp_path.glob("step-00000002.tmp/manifest.json")):
        pass  # the manifest is written, the rename is to come
    assert latest(str(tmp_path)) == earlier  # what a run killed here would go on from
    may_commit.set()
    path = saver.settle(wait=True)
    assert path == latest(str(tmp_path)) == str(tmp_path / "step-00000002")
    assert saver.settle() is None and saver.settle(wait=True) is None

    checkpoint = Checkpoint(path)
    checkpoint.verify()
    torch.testing.assert_close(checkpoint.weights(), wanted, rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.reader("memory")("rows"), rows, rtol=0, atol=0)
    assert not torch.equal(bank.rows, rows)


def fail_to_write(directory):
    """The error of `settle` on each rank, when rank 1's disk is full at the second checkpoint."""
    engine, bank = make_engine(), filled_bank()
    saver = Saver(directory, tiny_config(), LABELS, {}, keep=3)
    saver.start(1, engine, {"memory": bank})
    saver.settle(wait=True)
    original = saver_module.write_tensors

    def write_tensors(*arguments):
        if dist.rank() == 1:
            raise OSError("no space left")
        return original(*arguments)

    saver_module.write_tensors = write_tensors
    try:
        saver.start(2, engine, {"memory": bank})
        while saver.settle() is None:
            step_on(engine, bank)  # an error comes out at a step boundary, on all ranks
    except ValueError as error:
        return str(error)
    finally:
        saver_module.write_tensors = original
    raise AssertionError("no error")


def test_a_threads_error_ends_all_ranks_and_leaves_the_older_one(process_pool, tmp_path):
    errors = process_pool(2).run(fail_to_write, str(tmp_path))
    assert errors == ["worker 1: cannot read or write: no space left"] * 2
    assert latest(str(tmp_path)) == str(tmp_path / "step-00000001")


def test_what_a_killed_process_left_goes_with_the_next_whole_one(tmp_path):
    def write(step):
        save(str(tmp_path), step, make_engine(), {}, tiny_config(), LABELS, keep=3)

    for step in (1, 2):
        write(step)
    Path(tmp_path, "step-00000002", "manifest.json").unlink()
    Path(tmp_path, "step-00000003.tmp").mkdir()
    write(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]
