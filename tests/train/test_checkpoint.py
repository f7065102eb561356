"""Checkpoints: whole or not chosen, unchanged or refused, readable at any number of workers."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory.digest import digest_of
from train.tiny import Tiny, micro_batches, save, tiny_config

from memseg_dist import dist
from memseg_dist.batch import Clock
from memseg_dist.data.files import filesystem_of
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.memory.layouts import Rings
from memseg_dist.memory.means import ClassMeans
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Overwrite
from memseg_dist.train.checkpoint import (
    Checkpoint,
    check_same_run,
    latest,
    load,
    whole_checkpoints,
)
from memseg_dist.train.engine import TorchEngine
from memseg_dist.train.storage import make_writable, together

LABELS = LabelSpace.union({"source0": Vocabulary((Category("n1", "cat"), Category("n2", "dog")))})
NUM_CLASSES = 7


def make_engine() -> TorchEngine:
    engine = TorchEngine(Tiny(), tiny_config(), torch.device("cpu"))
    for batch, clock in micro_batches(0, dist.rank(), dist.size()):
        engine.backward(sum(engine(batch, clock).values()), clock)
    engine.step(0.1)
    return engine


def make_bank(table="sharded", dtype=torch.float32) -> ShardedRows:
    return ShardedRows(Rings(NUM_CLASSES, 2), Overwrite(), 3, table=table, dtype=dtype)


def filled_bank(table="sharded", dtype=torch.float32) -> ShardedRows:
    """The same content at any number of ranks: rank 0 proposes everything."""
    bank = make_bank(table, dtype)
    for step in range(3):
        if dist.rank() == 0:
            rows = torch.arange(12.0).view(4, 3) + 100 * step
            bank.propose([0, 2, 2, 6 - step], rows, Clock(step))
        bank.commit(Clock(step))
    return bank


def write(directory, step=1, keep=3, table="sharded", dtype=torch.float32):
    memories = {"memory": filled_bank(table, dtype), "other": filled_bank("local")}
    path = save(directory, step, make_engine(), memories, tiny_config(), LABELS, keep=keep)
    return path, digest_of(memories["memory"], values=True)


def read(path, table="sharded", dtype=torch.float32):
    engine, bank = make_engine(), make_bank(table, dtype)
    means = ClassMeans(bank)
    step = load(Checkpoint(path), engine, {"memory": bank}, tiny_config(), LABELS, {})
    return step, digest_of(bank, values=True), dict(engine.state().weights), means.means


@pytest.mark.parametrize("table", ["sharded", "local"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_by_two_read_by_one_and_three(process_pool, tmp_path, table, dtype):
    directory = str(tmp_path / "c")
    (path, _), _ = process_pool(2).run(write, directory, 4, 3, table, dtype)
    ((step, alone, weights, means),) = process_pool(1).run(read, path, table, dtype)
    reference = process_pool(1).run(write, str(tmp_path / "d"), 4, 3, table, dtype)[0][1]
    assert step == 4 and alone == reference
    for _, digest, _, other_means in process_pool(3).run(read, path, table, dtype):
        torch.testing.assert_close(other_means, means, rtol=0, atol=0)
        assert table == "local" or digest == reference
    torch.testing.assert_close(weights, Checkpoint(path).weights(), rtol=0, atol=0)
    names = {file.name for file in Path(path).iterdir()}
    assert "memory-other-00000-of-00002.safetensors" in names
    assert "memory-other-00001-of-00002.safetensors" not in names  # the same rows, written once


def test_a_reader_takes_only_the_rows_it_needs(process_pool, tmp_path):
    (path, _), *_ = process_pool(3).run(write, str(tmp_path))
    reader = Checkpoint(path).reader("memory")
    whole = reader("rows")
    assert whole.shape == (2 * NUM_CLASSES, 3)
    for start, stop in ((0, 2), (1, 11), (3, 3), (10, 14), (14, 14)):
        torch.testing.assert_close(reader("rows", start, stop), whole[start:stop], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"memory 'memory' has no tensor 'rowz'"):
        reader("rowz")
    with pytest.raises(ValueError, match=r"holds no memory 'teacher', only \['memory', 'other'\]"):
        Checkpoint(path).reader("teacher")


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.safetensors",
        "memory-memory-00001-of-00002.safetensors",
        "run.json",
    ],
)
def test_a_flipped_byte_is_refused_with_file_and_hashes(process_pool, tmp_path, name):
    (path, _), _ = process_pool(2).run(write, str(tmp_path))
    file = Path(path, name)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    hashes = r"SHA-256 is [0-9a-f]{64}, the manifest says [0-9a-f]{64}"
    with pytest.raises(RuntimeError, match=rf"{name} is damaged: {hashes}; delete") as caught:
        process_pool(2).run(read, path)
    assert "rank 0" in str(caught.value) and "rank 1" in str(caught.value)  # none is left waiting


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    path, _ = write(str(tmp_path))
    engine = TorchEngine(Tiny(num_sources=3), tiny_config(), torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"{path}: the saved weights do not fit this run's Tiny"):
        load(Checkpoint(path), engine, {}, tiny_config(), LABELS, {})


def test_torn_checkpoints_are_passed_over_and_named(tmp_path, caplog):
    directory = tmp_path / "c"
    assert latest(str(directory)) is None
    for step in (1, 2, 3, 4):
        write(str(directory), step, keep=9)
    (directory / "step-00000004" / "manifest.json").unlink()
    cut = directory / "step-00000003" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    (directory / "step-00000005.tmp").mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest(str(directory)) == str(directory / "step-00000002")
    for name in ("step-00000003", "step-00000004", "step-00000005.tmp"):
        assert f"incomplete checkpoint {directory / name}" in caplog.text
    write(str(directory), 5)  # the torn one is no obstacle
    assert latest(str(directory)) == str(directory / "step-00000005")


def test_old_checkpoints_are_deleted(tmp_path):
    for step in (1, 2, 3):
        write(str(tmp_path), step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_url_will_do():
    path, digest = write("memory://run/checkpoints", 7)
    assert latest("memory://run/checkpoints") == path
    step, found, _, _ = read(path)
    assert (step, found) == (7, digest)


def test_one_ranks_write_error_reaches_all(process_pool, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"cannot read or write.*") as caught:
        process_pool(2).run(write, str(tmp_path / "file" / "c"))
    assert "rank 0" in str(caught.value) and "rank 1" in str(caught.value)


def test_nothing_is_pickled_and_safetensors_reads_it(tmp_path):
    path, _ = write(str(tmp_path))
    from safetensors.torch import load_file

    for file in Path(path).iterdir():
        if file.suffix == ".safetensors":
            assert load_file(file)
        else:
            json.loads(file.read_text())
        assert b"torch._utils" not in file.read_bytes()
    saved = load_file(Path(path, "memory-memory-00000-of-00001.safetensors"))
    torch.testing.assert_close(saved["rows"], filled_bank().state_dict()["rows"].tensor)


def test_a_newer_format_is_refused(tmp_path):
    path, _ = write(str(tmp_path))
    manifest = Path(path, "manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match=r"manifest.json: format 2, this version reads 1"):
        _ = Checkpoint(path).step


def changed(value, path, to):
    """A copy of JSON values with what lies at the dotted path set, or deleted for None."""
    *parents, last = path.split("/")
    copy = inner = json.loads(json.dumps(value))
    for name in parents:
        inner = inner[name]
    inner.pop(last) if to is None else inner.update({last: to})
    return copy


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        ("step", None, "the key 'step' is missing"),
        ("step", "4", "step is '4'; it must be of type int"),
        ("files", [], r"files is \[\]; it must be an object"),
        ("files/run.json", None, r"a list that has \['run.json'\] too"),
        ("files/run.json/sha256", 5, "files.run.json.sha256 is 5; it must be of type str"),
        ("files//etc/passwd", {"sha256": "", "bytes": 0}, None),
        ("memories/memory/rows", [["gone.safetensors", 0, 14]], r"has \['gone.safetensors'\] too"),
        ("memories/memory/rows", [["model.safetensors", 0]], "must be a list of 3"),
        ("memories/memory/rows", [], r"memories.memory.rows is \(\); it must be one file or more"),
        ("memories/memory/rows", [["model.safetensors", 1, 14]], "rows from 0 without a gap"),
        ("memories/memory/rows", [["model.safetensors", 7, -1]], "rows from 0 without a gap"),
        ("memories/memory/rows", [["model.safetensors", 0, 14]], "model.safetensors is damaged"),
        ("memories/memory/rows/0/2", 3, "not all in"),
    ],
)
def test_an_edited_manifest_is_refused_with_its_place(tmp_path, path, to, message):
    directory, _ = write(str(tmp_path))
    file = Path(directory, "manifest.json")
    manifest = json.loads(file.read_text())
    if path.startswith("files//"):
        manifest["files"]["/etc/passwd"] = to
        message = r"files is \['/etc/passwd'\]; it must be files of the checkpoint's own"
    elif path.endswith("/0/2"):
        manifest["memories"]["memory"]["rows"][0][2] = to
    else:
        manifest = changed(manifest, path, to)
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"{directory}/.*{message}"):
        Checkpoint(directory).reader("memory")("rows", 0, 14)


def test_a_run_json_without_its_parts_is_refused(tmp_path):
    directory, _ = write(str(tmp_path))
    for content, message in (("{}", r"has only \[\]"), ("[1]", "expected a JSON object")):
        Path(directory, "run.json").write_text(content)
        with pytest.raises(ValueError, match=rf"run\.json.*{message}"):
            _ = Checkpoint(directory).config


def test_maps_may_move_but_not_come_or_go(tmp_path):
    def config(saliency):
        made = tiny_config()
        sources = tuple(replace(source, saliency=saliency) for source in made.sources)
        return replace(made, sources=sources)

    path = save(str(tmp_path), 1, make_engine(), {}, config("/old/maps"), LABELS, keep=1)
    check_same_run(Checkpoint(path), config("s3://bucket/maps"), LABELS, {})
    with pytest.raises(ValueError, match=r"saliency: True -> False"):
        check_same_run(Checkpoint(path), config(None), LABELS, {})


def test_lists_may_move_but_a_split_keeps_its_name(tmp_path):
    def config(split, pseudo_masks):
        made = tiny_config()
        changes = {"split": split, "pseudo_masks": pseudo_masks}
        return replace(made, sources=tuple(replace(each, **changes) for each in made.sources))

    before = config("/old/lists/1_16.txt", "/old/labels")
    path = save(str(tmp_path), 1, make_engine(), {}, before, LABELS, keep=1)
    for split in ("/new/1_16.txt", "s3://bucket/1_16.txt", "1_16"):
        check_same_run(Checkpoint(path), config(split, "/new/labels"), LABELS, {})
    for split, pseudo_masks, message in (
        ("/old/lists/1_8.txt", "/old/labels", r"split: 1_16 -> 1_8"),
        (None, "/old/labels", r"split: 1_16 -> None"),
        ("1_16", None, r"pseudo_masks: True -> False"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_run(Checkpoint(path), config(split, pseudo_masks), LABELS, {})


def test_data_are_compared_where_both_are_known(tmp_path):
    data = {"weak": "1", "weak.pseudo_masks": "2"}
    path = save(str(tmp_path), 1, make_engine(), {}, tiny_config(), LABELS, data=data, keep=1)
    check_same_run(Checkpoint(path), tiny_config(), LABELS, data)
    with pytest.raises(ValueError, match=r"written with other data of weak\.pseudo_masks \("):
        check_same_run(Checkpoint(path), tiny_config(), LABELS, data | {"weak.pseudo_masks": "3"})
    run = json.loads(Path(path, "run.json").read_text())
    del run["data"]  # as earlier versions wrote it
    Path(path, "run.json").write_text(json.dumps(run))
    check_same_run(Checkpoint(path), tiny_config(), LABELS, data)


def test_trying_a_directory_leaves_nothing_there(tmp_path):
    make_writable(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(24, "Too many open files"), KeyError("SlowDown")])
def test_what_a_store_cannot_read_now_is_neither_passed_over_nor_deleted(monkeypatch, failure):
    directory = f"memory://{type(failure).__name__}"
    for step in (1, 2, 3):
        write(directory, step)
    store, _ = filesystem_of(directory)
    plain = type(store).cat_file

    def failing(self, path, *arguments, **options):
        if path.endswith("step-00000002/manifest.json"):
            raise failure
        return plain(self, path, *arguments, **options)

    monkeypatch.setattr(type(store), "cat_file", failing)
    with pytest.raises(ValueError, match=rf"cannot read {directory}/step-00000002/manifest.json"):
        latest(directory)
    write(directory, 4, keep=1)  # it ends no run
    monkeypatch.undo()
    assert [path[-1] for path in whole_checkpoints(directory)] == ["1", "2", "3", "4"]


def test_what_has_just_been_written_stays(tmp_path):
    write(str(tmp_path), 9)
    path, _ = write(str(tmp_path), 3, keep=1)
    assert path in whole_checkpoints(str(tmp_path))


def fail_on_rank_1():
    def work():
        if dist.rank() == 1:
            raise LookupError("of a store")

    with pytest.raises(RuntimeError, match=r"worker 1: LookupError: .*of a store"):
        together(work)
    return dist.rank()


def test_an_error_of_any_kind_reaches_all(process_pool):
    assert process_pool(2).run(fail_on_rank_1) == [0, 1]
