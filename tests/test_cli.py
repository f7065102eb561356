"""The commands on a small checkpoint: what they write, what they print, what they refuse."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pictures import write_image
from PIL import Image
from train.shards import CATEGORIES, larvseg_config, write_squares
from train.tiny import save
from webdataset import TarWriter

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import Clock
from memseg_dist.cli import main
from memseg_dist.config import EngineConfig
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.evaluation.sliding import Inference, segment, segment_batch
from memseg_dist.nn.densecrf import DEEPLAB
from memseg_dist.tools.shards import Sample, finish, write_shard
from memseg_dist.train.engine import TorchEngine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with one checkpoint: random weights, a memory of three classes."""
    root = tmp_path_factory.mktemp("cli")
    for name, num_classes, with_masks in (("masks", 2, 1), ("weak", 4, 0), ("val", 4, 1)):
        write_squares(root / name, 8, num_classes, with_masks=bool(with_masks))
    config = larvseg_config(root, root / "runs", engine=EngineConfig("torch"))
    label_space = build_label_space(config)
    method = build_method(config, label_space)
    bank = method.memory.rows
    generator = torch.Generator().manual_seed(0)
    for step, class_id in enumerate((0, 1, 3, 3, 0)):
        rows = torch.nn.functional.normalize(torch.randn(1, bank.shape[0], generator=generator))
        bank.propose([class_id], rows, Clock(step))
        bank.commit(Clock(step))
    engine = TorchEngine(method, config, torch.device("cpu"))
    directory = root / "runs" / "run"
    save(str(directory / "checkpoints"), 5, engine, method.state(), config, label_space, keep=1)
    return root, directory, method


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, size in (("one.jpg", (40, 56)), ("two.png", (33, 21))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def command(*arguments) -> None:
    main([str(argument) for argument in arguments])


def fails(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert isinstance(stopped.value.code, str) and stopped.value.code.startswith("error: ")
    return stopped.value.code


def test_predict_writes_three_files_per_picture(run, pictures, tmp_path):
    _, directory, _ = run
    images = [pictures / "one.jpg", pictures / "two.png"]
    command("predict", *images, "--checkpoint", directory, "--out", tmp_path)
    for name, (height, width) in (("one", (40, 56)), ("two", (33, 21))):
        labels = np.array(Image.open(tmp_path / f"{name}.labels.png"))
        assert labels.shape == (height, width)
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert (report["height"], report["width"]) == (height, width)
        shares = [row["share"] for row in report["classes"]]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
        for row in report["classes"]:
            assert row["pixels"] == (labels == row["id"]).sum()
            assert row["uid"] == CATEGORIES[row["id"]].uid
        assert Image.open(tmp_path / f"{name}.overlay.png").width > width
    with Image.open(tmp_path / "one.labels.png") as labels:
        assert labels.mode == "I;16"


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_names_that_no_file_can_have(tmp_path, name):
    assert repr(name)[1:-1] in fails("data", "verify", tmp_path / name)


def test_predict_only_what_was_asked_for(run, pictures, tmp_path):
    arguments = ["--checkpoint", run[1], "--out", tmp_path, "--classes", "Sun, n1"]
    command("predict", pictures / "one.jpg", *arguments)
    report = json.loads((tmp_path / "one.json").read_text())
    assert {row["uid"] for row in report["classes"]} <= {"n1", "n3"}


def test_predict_takes_folders_and_patterns_and_skips_a_bad_picture(run, tmp_path, capsys):
    for number, name in enumerate(("a/one", "a/two", "b/one", "c")):
        write_image(tmp_path / "in" / f"{name}.jpg", number, (40, 30))
    (tmp_path / "in" / "b" / "bad.jpg").write_text("no picture")
    (tmp_path / "in" / "d.bmp").touch()
    common = ["--checkpoint", run[1], "--out"]
    message = fails("predict", tmp_path / "in", *common, tmp_path / "out", "--batch", 3)
    assert "bad.jpg is not a JPEG" in message and "one.jpg" not in message
    assert "1 files left out: d.bmp (.bmp: none of" in capsys.readouterr().err
    names = ["a/one", "a/two", "b/one", "c"]
    written = sorted((tmp_path / "out").rglob("*.json"))
    assert [str(path.relative_to(tmp_path / "out"))[:-5] for path in written] == names
    command("predict", f"{tmp_path}/in/a/*.jpg", *common, tmp_path / "again")
    for name in ("one", "two"):
        together = np.array(Image.open(tmp_path / "out/a" / f"{name}.labels.png"))
        alone = np.array(Image.open(tmp_path / "again" / f"{name}.labels.png"))
        assert (together == alone).mean() > 0.99
    (tmp_path / "in/a/one.png").touch()
    assert "same files" in fails("predict", tmp_path / "in", *common, tmp_path / "x")
    assert "no file is named like" in fails("predict", "nothing/*.jpg", *common, tmp_path / "x")
    assert "--batch 0" in fails("predict", tmp_path / "in/c.jpg", *common, tmp_path, "--batch", 0)


def test_predict_names_flag_and_value(run, pictures, tmp_path):
    image, common = pictures / "one.jpg", ["--checkpoint", run[1], "--out", tmp_path]
    message = fails("predict", image, *common, "--classes", "red,gren")
    assert "--classes: 'gren'" in message and "nearest: green" in message
    assert "--device moon" in fails("predict", image, *common, "--device", "moon")
    (tmp_path / "text.jpg").write_text("no picture")
    assert "text.jpg is not a JPEG" in fails("predict", tmp_path / "text.jpg", *common)
    assert "nowhere.jpg" in fails("predict", "nowhere.jpg", *common)
    assert "same files" in fails("predict", image, tmp_path / "one.png", *common)
    assert "--stride 9 is larger than --window 8" in fails(
        "predict", image, *common, "--mode", "slide", "--window", 8, "--stride", 9
    )
    for flags in (("--resize", 0, 0), ("--window", 0), ("--stride", 0), ("--window", -8)):
        value = flags[1] if len(flags) == 2 else flags[1:]
        assert f"{flags[0]} is {value}; it must be" in fails("predict", image, *common, *flags)
    assert "--scales is (nan,)" in fails("predict", image, *common, "--scales", "nan")
    missing = fails("predict", image, "--checkpoint", tmp_path / "no", "--out", tmp_path)
    assert "no whole checkpoint there" in missing and "--checkpoint" in missing
    blocked = tmp_path / "file"
    blocked.write_text("")
    message = fails("predict", image, "--checkpoint", run[1], "--out", blocked / "out")
    assert "cannot write to" in message


VIEWS = (
    "--scales",
    0.5,
    1.5,
    "--flip",
    True,
    "--swap",
    "n0",
    "green",
    "--average",
    "probabilities",
)


def test_flags_of_multi_scale_testing(run, pictures, tmp_path, monkeypatch):
    found = []

    def watched(function):
        def watching(*arguments):
            found.append(arguments[3])
            return function(*arguments)

        return watching

    monkeypatch.setattr("memseg_dist.tools.predict.segment_batch", watched(segment_batch))
    monkeypatch.setattr("memseg_dist.evaluation.evaluate.segment", watched(segment))
    common = ["--checkpoint", run[1], "--out", tmp_path]
    command("predict", pictures / "one.jpg", *common, *VIEWS)
    command("eval", *common, "--max-images", 1, *VIEWS)
    command("predict", pictures / "one.jpg", *common, "--flip", False)
    command("predict", pictures / "one.jpg", *common, "--crf")
    views = {"scales": (0.5, 1.5), "flip": True, "swap": ((0, 1),), "average": "probabilities"}
    expected = Inference("whole", (32, 32), **views)
    plain = Inference("whole", (32, 32))
    assert found == [expected, expected, plain, dataclasses.replace(plain, crf=DEEPLAB)]
    for flags, message in (
        (("--scales", 0), "--scales is (0.0,); it must be one or more finite numbers above 0"),
        (("--scales", 1, "nan"), "--scales is (1.0, nan)"),
        (("--swap", "n0", "n0"), "--swap is"),
        (("--swap", "n0", "n77"), "--swap: 'n77' is no uid, name or synonym"),
    ):
        assert message in fails("predict", pictures / "one.jpg", *common, *flags)


def test_a_damaged_checkpoint_is_refused(run, pictures, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run[1], copy)
    weights = next(copy.rglob("model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    message = fails("predict", pictures / "one.jpg", "--checkpoint", copy, "--out", tmp_path)
    assert "model.safetensors is damaged" in message


def test_eval_on_the_runs_own_validation_set(run, tmp_path, capsys):
    command(
        "eval", "--checkpoint", run[1], "--out", tmp_path, "--panels", 2, "--buckets",
        "--max-images", 5,
    )  # fmt: skip
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_images"] == 5
    assert scores["groups"]["base"]["num_classes"] == scores["groups"]["novel"]["num_classes"] == 2
    assert scores["groups"]["tail"]["num_classes"] > 0
    assert "novel" in capsys.readouterr().out and "green" in (tmp_path / "classes.csv").read_text()
    assert len([*tmp_path.glob("panel-*.png")]) == 2


def test_eval_leaves_out_what_the_run_excludes(run, tmp_path):
    root, _, _ = run
    config = larvseg_config(root, tmp_path, engine=EngineConfig("torch"))
    validation = dataclasses.replace(config.validation, exclude=("n1", "n2"))
    config = dataclasses.replace(config, validation=validation)
    space = build_label_space(config)
    method = build_method(config, space)
    engine = TorchEngine(method, config, torch.device("cpu"))
    save(str(tmp_path / "run"), 1, engine, method.state(), config, space, keep=1)
    command("eval", "--checkpoint", tmp_path / "run", "--max-images", 1, "--out", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [row["uid"] for row in scores["classes"]] == ["n0", "n3"]


def test_eval_prototype_probe(run, tmp_path, capsys):
    command("eval", "--checkpoint", run[1], "--prototype-probe", "--runs", 2, "--out", tmp_path)
    assert len(json.loads((tmp_path / "scores.json").read_text())["runs"]) == 2
    assert "std" in capsys.readouterr().out


def test_eval_on_other_data(run, tmp_path, capsys):
    """Its vocabulary is in another order and has a class that the model does not know."""
    _, directory, _ = run
    data = tmp_path / "data"
    mask = np.repeat(np.arange(3, dtype=np.uint16), 11)[None].repeat(33, axis=0)
    image = Image.fromarray(np.zeros((33, 33, 3), np.uint8))
    image.save(tmp_path / "black.png")
    content = (tmp_path / "black.png").read_bytes()
    write_shard(data, 0, [Sample("a", content, "png", mask=mask)], num_classes=3)
    finish(data, Vocabulary((CATEGORIES[3], Category("x9", "moon"), CATEGORIES[0])))
    arguments = ["eval", "--checkpoint", directory, "--data", data]
    message = fails(*arguments)
    assert "1 of its 3 classes are unknown" in message and "--ignore-unknown" in message
    command(*arguments, "--ignore-unknown", "--out", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    groups = {row["uid"]: (row["group"], row["pixels"]) for row in scores["classes"]}
    assert groups == {"n0": ("base", 33 * 11), "n3": ("novel", 33 * 11)}
    assert "--out" in fails(*arguments, "--panels", 2)


def test_bank_inspect_and_publish(run, tmp_path, capsys):
    command("bank", "inspect", "--checkpoint", run[1], "--out", tmp_path / "bank")
    printed = capsys.readouterr().out
    assert (
        "5 rows of 16 channels in 4 classes" in printed
        and "never" in printed
        and "coverage 75.0%" in printed
    )
    table = pq.read_table(tmp_path / "bank")
    assert table["uid"].to_pylist() == ["n0", "n0", "n1", "n3", "n3"]
    command("bank", "inspect", "--checkpoint", run[1], "--classes", "sun")
    printed = capsys.readouterr().out
    assert "sun" in printed and "green" not in printed


def test_bank_search(run, pictures, tmp_path, capsys):
    command("bank", "search", "--checkpoint", run[1], "--like", "sun")
    first = [line for line in capsys.readouterr().out.splitlines() if "n" in line][1]
    assert "n3" in first and "1.0000" in first
    image = pictures / "one.jpg"
    common = ["bank", "search", "--checkpoint", run[1]]
    command(*common, "--image", image, "--at", 55, 39, "--rows", "--neighbours", 5)
    assert capsys.readouterr().out.count("n0") == 2
    command("bank", "inspect", "--checkpoint", run[1], "--out", tmp_path / "bank")
    command(*common, "--bank", tmp_path / "bank", "--like", "n1")
    assert "n1" in capsys.readouterr().out
    assert "no rows of class 'n2'" in fails(*common, "--like", "blue")
    assert "56 x 40 pixels" in fails(*common, "--image", image, "--at", 56, 0)
    assert "give one of --like" in fails(*common)
    assert "--at go together" in fails(*common, "--image", image)


def test_a_run_without_a_memory(run, tmp_path):
    root, _, _ = run
    config = larvseg_config(root, tmp_path, engine=EngineConfig("torch"))
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, attention="off"))
    space = build_label_space(config)
    method = build_method(config, space)
    engine = TorchEngine(method, config, torch.device("cpu"))
    save(str(tmp_path / "run"), 1, engine, method.state(), config, space, keep=1)
    assert "has no memory bank" in fails("bank", "inspect", "--checkpoint", tmp_path / "run")
    command("eval", "--checkpoint", tmp_path / "run", "--panels", 1, "--out", tmp_path / "out")
    assert len([*(tmp_path / "out").glob("panel-*.png")]) == 1


def test_data_verify(run, tmp_path, capsys):
    command("data", "verify", run[0] / "val")
    assert "8 samples, 8 masks" in capsys.readouterr().out
    assert "nowhere" in fails("data", "verify", tmp_path / "nowhere")


def test_help_names_every_command(capsys):
    for words, expected in (([], "predict"), (["bank"], "search"), (["predict"], "--classes")):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        assert stopped.value.code == 0
        assert expected in capsys.readouterr().out


def test_data_index_makes_shards_of_others_a_data_set(tmp_path, capsys):
    Vocabulary(CATEGORIES[:2]).save(tmp_path / "vocabulary.json")
    with TarWriter(str(tmp_path / "0.tar"), encoder=False) as writer:
        for number in range(2):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
            writer.write({"__key__": str(number), "png": buffer.getvalue(), "cls": b"1"})
    command("data", "index", tmp_path)
    command("data", "verify", tmp_path)
    out = capsys.readouterr().out
    assert out.count("1 shards, 2 samples, 0 masks") == 2
    assert "no data set at" in fails("data", "index", tmp_path / "absent")
