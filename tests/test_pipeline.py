"""A job's command line and its stages: flags, references, resumption, early errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toy_job
from safetensors.torch import load_file

from memseg_dist import pipeline
from memseg_dist.config import RunConfig, ValidationConfig
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.index import Index
from memseg_dist.data.loader import Source
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.methods.labeller import ArgmaxLabeller
from memseg_dist.methods.rca.config import RCAConfig
from memseg_dist.methods.rca.fusion import FusionConfig
from memseg_dist.methods.rca.labeller import ActivationLabeller
from memseg_dist.methods.segment import SegmentConfig
from memseg_dist.nn.backbone import BackboneConfig, build_backbone
from memseg_dist.pipeline import JobOptions, main, named_flags, parse, run_stages
from memseg_dist.platforms import process
from memseg_dist.stages import ExportConfig, LabelConfig, read_by, resolved, result
from memseg_dist.tools.export import export_backbone
from memseg_dist.tools.miniature import draw, draw_miniature, draw_split, shrunk

TOYS = toy_job.vocabularies(toy_job.Options())["toys"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the toy's shards."""
    monkeypatch.chdir(tmp_path)
    draw_miniature(Path("data"), TOYS, with_masks=True, size=40)
    return tmp_path


def toy(*arguments: str) -> None:
    main(toy_job.Options, toy_job.stages, toy_job.vocabularies, "A toy.", arguments)


def parsed(*arguments: str):
    return parse(toy_job.Options, toy_job.stages, "A toy.", arguments)[1]


def one_stage(options: JobOptions):
    return {"train": replace(toy_job.stages(toy_job.Options())["train"], name="single")}


def error_of(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        toy(*arguments)
    return str(caught.value.code)


# ------------------------------------------------------------------ command line


def test_every_field_of_every_stage_is_a_flag():
    stages = parsed(
        *("--train.steps", "7", "--tune.steps", "9", "--tune.optimizer.lr", "0.5"),
        *("--train.sources.0.slots", "3", "--export.out", "elsewhere.safetensors"),
    )
    assert (stages["train"].steps, stages["tune"].steps) == (7, 9)
    assert (stages["train"].optimizer.lr, stages["tune"].optimizer.lr) == (1e-3, 0.5)
    assert (stages["train"].sources[0].slots, stages["tune"].sources[0].slots) == (3, 1)
    assert stages["export"].out == "elsewhere.safetensors"


def test_the_jobs_options_change_all_stages_and_a_stages_flag_only_its_own():
    stages = parsed("--storage", "S", "--name", "x", "--seed", "3", "--tune.seed", "4")
    train, tune = stages["train"], stages["tune"]
    assert (train.name, train.storage, train.seed) == ("x", "S", 3)
    assert (tune.name, tune.storage, tune.seed) == ("x_tuned", "S", 4)


def test_the_flags_of_one_stage_have_no_prefix():
    arguments = ["--steps", "7", "--launch.workers", "1", "1", "--storage", "S"]
    _, stages = parse(JobOptions, one_stage, None, arguments)
    assert (stages["train"].steps, stages["train"].launch.workers) == (7, (1, 1))
    assert stages["train"].storage == "S"


@pytest.mark.parametrize("flag", ["--steps", "--tune.step", "--bogus", "--smok"])
def test_an_unknown_flag_is_an_error(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        parsed(flag, "3")
    assert caught.value.code == 2
    assert flag in capsys.readouterr().err


def test_a_wrong_value_of_an_option_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--seed", "many")
    assert caught.value.code == 2
    assert "--seed" in capsys.readouterr().err


def test_help_shows_options_and_stages_with_the_jobs_values(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--data", "mine", "--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "A toy." in text and "--smoke" in text and "--launch.workers" in text
    assert "--train.steps INT Optimizer steps of the whole run. (default: 4)" in text
    assert "--export.checkpoint" in text and "(default: stage:train)" in text
    assert "Folder of its shards. (default: mine)" in text


# ------------------------------------------------------------------ references


def test_a_later_stage_follows_an_earlier_ones_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = resolved(parsed("--train.name", "mine", "--train.storage", "there"))
    run = str(tmp_path / "there" / "mine")
    assert stages["export"].checkpoint == run
    assert stages["tune"].backbone.pretrained == f"{run}/weights/backbone.safetensors"
    assert stages["tune"].directory == str(tmp_path / "runs" / "toy_tuned")
    labels = LabelConfig(result("train"), "data", result("train") + "/labels")
    source = Source("pseudo", result("labels"), "masks")
    segmenter = replace(one_stage(JobOptions())["train"], sources=(source,))
    chain = {"train": stages["train"], "labels": labels, "segmenter": segmenter}
    assert resolved(chain)["segmenter"].sources[0].path == f"{run}/labels"


@pytest.mark.parametrize("name", ["nobody", "tune"])
def test_a_reference_to_an_unknown_or_later_stage_is_an_error(name):
    stages = parsed("--export.checkpoint", result(name))
    with pytest.raises(ValueError, match=f"'export' refers to .* stage '{name}'.*\\['train'\\]"):
        resolved(stages)


# ------------------------------------------------------------------ running


def test_stages_run_in_order_and_until(folder, capsys):
    toy("--until", "export")
    printed = capsys.readouterr().out
    assert re.findall("stage .*", printed) == ["stage 1 of 2: train", "stage 2 of 2: export"]
    file = folder / "runs/toy/weights/backbone.safetensors"
    weights = load_file(file)
    fresh = build_backbone(BackboneConfig("test_vit", image_size=32, drop_path=0.0))
    assert weights.keys() == fresh.state_dict().keys()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    trained = load_file(folder / "runs/toy/checkpoints/step-00000004/model.safetensors")
    assert all(part.equal(trained[f"backbone.{name}"]) for name, part in weights.items())

    toy("--start-at", "tune")
    assert "stage 1 of 1: tune" in capsys.readouterr().out
    tuned = json.loads((folder / "runs/toy_tuned/config.json").read_text())
    assert tuned["backbone"]["pretrained"] == str(file)


def test_stages_that_do_not_exist_cannot_be_chosen(folder):
    assert "--until nobody: there is no such stage; choose of ['train'" in error_of(
        "--until", "nobody"
    )
    assert "--start-at tune comes after --until train" in error_of(
        "--start-at", "tune", "--until", "train"
    )
    assert not Path("runs").exists()


def test_each_stage_goes_on_where_it_was_stopped_or_killed(folder):
    """SIGTERM in the first stage, SIGKILL in the third, then the same command to the end."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", str(root / "tests" / "toy_job.py"), "--train.steps", "300"]

    def run(until: str | None, signal_number: int = 0) -> tuple[int, list[str]]:
        lines = []
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if until is not None and line.startswith(until):
                    process.send_signal(signal_number)
                    until = None
        return process.returncode, lines

    def steps(name: str) -> list[int]:
        rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
        return [row["step"] for row in rows if "loss" in row]

    code, lines = run("step   3/300 ", signal.SIGTERM)
    assert code == os.EX_TEMPFAIL and not any(line.startswith("stage 2") for line in lines)
    assert lines[-1] == "stopped; the same command goes on where it was\n"
    assert not any("Traceback" in line for line in lines)
    assert steps("toy")[-1] < 300
    code, _ = run("stage 3 of 3: tune", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert steps("toy") == list(range(1, 301))  # none twice, none left out
    code, lines = run(None)
    assert code == 0
    assert steps("toy") == list(range(1, 301)) and steps("toy_tuned") == [1, 2, 3, 4]


def test_smoke_draws_what_it_needs_and_follows_the_references(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy("--smoke", "--train.engine.kind", "torch")
    train, tuned = sorted(Path("runs").iterdir())
    assert train.name.startswith("toy-smoke-") and tuned.name.startswith("toy_tuned-smoke-")
    assert (train / "data/toys/index.parquet").exists()
    for run in (train, tuned):
        assert (run / "checkpoints/step-00000004/manifest.json").exists()
    pretrained = json.loads((tuned / "config.json").read_text())["backbone"]["pretrained"]
    assert pretrained == str((train / "weights/backbone.safetensors").resolve())


def two_stages(options: JobOptions) -> dict:
    """A few masks; what was learned labels all images; the same few masks beside these labels."""
    run = toy_job.stages(toy_job.Options())["train"]
    few = Source("few", "shards", "masks", 1, 2, split="lists/1_2.txt")
    images = Source("images", "shards", "masks", 3, 2, AugmentConfig(flip=0.5))
    first = replace(run, name="first", method=SegmentConfig(head="linear"), sources=(few,))
    labels = LabelConfig(
        result("first"), "shards", result("first") + "/labels", ArgmaxLabeller(threshold=0.0),
        workers=0,
    )  # fmt: skip
    pseudo = result("labels")
    sources = (replace(few, slots=7, pseudo_masks=pseudo), replace(images, pseudo_masks=pseudo))
    return {"first": first, "labels": labels, "second": replace(first, name="s", sources=sources)}


def test_smoke_draws_splits_and_keeps_pseudo_masks_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classes = Vocabulary(tuple(Category(f"toy:{n}", f"toy {n}") for n in range(20)))

    def vocabularies(_):
        return {"few": classes, "images": classes}

    main(JobOptions, two_stages, vocabularies, None, ["--smoke"])
    first, second = sorted(Path("runs").iterdir())
    sources = json.loads((second / "config.json").read_text())["sources"]
    shards = str((first / "data/few").resolve())
    assert {source["path"] for source in sources} == {shards}  # the same shards, as they were
    assert {source["pseudo_masks"] for source in sources} == {str((first / "labels").resolve())}
    assert [source["split"] for source in sources] == ["1_2", None]
    index = Index.open(shards)
    few = index.only(Path(shards, "splits/1_2.txt").read_text().split())
    assert (len(index), len(few)) == (8, 7)  # of half the images too few for the slots
    assert (few.class_image_counts(20) > 0).all()
    assert (second / "checkpoints/step-00000004/manifest.json").exists()


def test_the_split_of_smoke_shows_every_class_or_is_half(tmp_path):
    for num_classes, with_masks, num_slots, expected in (
        (20, True, 1, 5),
        (20, False, 1, 4),
        (4, True, 1, 4),
        (4, False, 6, 6),
    ):
        classes = Vocabulary(tuple(Category(f"toy:{n}", f"toy {n}") for n in range(num_classes)))
        root = tmp_path / f"{num_classes}-{with_masks}-{num_slots}"
        draw_miniature(root, classes, with_masks=with_masks)
        draw_split(str(root / "splits/a.txt"), Index.open(root), num_slots)
        keys = (root / "splits/a.txt").read_text().split()
        assert keys == [*Index.open(root).all_keys()][:expected]


def test_smoke_writes_no_split_into_shards_that_are_there(tmp_path):
    run = toy_job.stages(toy_job.Options())["train"]
    draw_miniature(tmp_path / "real", TOYS, with_masks=True)
    source = Source("toys", str(tmp_path / "real"), "masks", split="1_4")
    draw({"train": replace(run, sources=(source,))}, {"toys": TOYS})
    assert not (tmp_path / "real/splits").exists()


def test_smoke_takes_the_masks_for_pseudo_masks_that_no_stage_writes():
    run = toy_job.stages(toy_job.Options())["train"]
    source = Source("toys", "data", "none", split="1_4", pseudo_masks="elsewhere")
    written = Source("more", result("labels"), "masks", split="1_4")
    small = shrunk({"train": replace(run, sources=(source, written))})["train"]
    ours, theirs = small.sources
    assert ours.pseudo_masks == ours.path and ours.path.endswith("/data/toys")
    assert (ours.split, theirs.split, theirs.path) == ("1_4", None, result("labels"))


# ------------------------------------------------------------------ early checks


@pytest.mark.parametrize("start_at", ["labels", "second"])
def test_a_stage_whose_input_is_not_there_fails_before_the_first(folder, start_at):
    stages = two_stages(JobOptions())
    names = [*stages][[*stages].index(start_at) :]
    missing = {"labels": "first", "second": "labels"}[start_at]
    message = (
        f"stage '{start_at}' reads the result of stage '{missing}', which is not at .*runs/first"
        f".* not among the stages to run; begin with it: --start-at {missing}"
    )
    draw_miniature(Path("shards"), TOYS, with_masks=True, size=40)
    with pytest.raises(ValueError, match=message):
        run_stages(stages, names)
    assert not Path("runs").exists()
    (folder / "runs/first/labels").mkdir(parents=True)  # a folder alone is no result
    with pytest.raises(ValueError, match=message):
        run_stages(stages, names)


def test_an_export_that_is_not_there_is_missed(folder):
    message = r"stage 'tune' reads .* 'export', which is not at .*weights/backbone\.safetensors"
    with pytest.raises(ValueError, match=message):
        run_stages(parsed(), ["tune"])
    assert "'export' reads the result of stage 'train'" in error_of("--start-at", "export")
    assert not Path("runs").exists()


def test_what_a_stage_reads():
    stages = two_stages(JobOptions())
    assert {name: read_by(stage) for name, stage in stages.items()} == {
        "first": [], "labels": ["first"], "second": ["labels"],
    }  # fmt: skip
    assert read_by(LabelConfig("runs/x", "data", result("first") + "/labels")) == []


def labelling(**changes) -> dict:
    """Train RCA, and label what it saw."""
    classifier = replace(
        one_stage(JobOptions())["train"],
        sources=(Source("toys", "data", "labels", hide_mask=True, exclude=("toy:0",)),),
        steps=8,  # two epochs: maps are accumulated after the first
        method=RCAConfig(map_size=4, head_width=8),
        validation=ValidationConfig("data", mode="whole", resize=(32, 32), exclude=("toy:0",)),
    )
    labels = LabelConfig(result("train"), "data", result("train") + "/labels", workers=0)
    return {"train": classifier, "labels": replace(labels, **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "s3://bucket/labels"}, "'labels' writes to s3://bucket/labels, which is a URL"),
        ({"truth": "nowhere"}, "truth nowhere has no shards"),
        ({"labeller": ActivationLabeller(saliency="none")}, "no saliency map .*none/data-0000"),
    ],
)
def test_what_would_fail_late_fails_before_the_first_stage(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        run_stages(labelling(**changes))
    assert not Path("runs").exists()
    run_stages(labelling(**changes), [])  # stages that are not chosen are not checked


def test_weights_are_there_before_the_first_stage(folder):
    wanted = "stage 'train': backbone weights '.*gone.safetensors' do not exist"
    flags = ("--until", "export", "--train.backbone.pretrained", "gone.safetensors")
    assert re.search(wanted, error_of(*flags))
    assert not Path("runs").exists()


def test_an_export_to_a_url_fails_before_the_first_stage(folder):
    stages = {
        "train": one_stage(JobOptions())["train"],
        "export": ExportConfig(result("train"), "s3://bucket/backbone.safetensors"),
    }
    with pytest.raises(ValueError, match=r"'export' writes to s3://bucket/backbone\.safetensors"):
        run_stages(stages)
    assert not Path("runs").exists()


def test_pseudo_labels_without_a_known_pixel_stop_the_pipeline(folder, capsys):
    strict = FusionConfig(use_crf=False, conflict=0.0, min_foreground=1.0)
    nothing = ActivationLabeller(fusion=strict)
    with pytest.raises(ValueError, match=r"every pixel of the pseudo labels in .* is unknown"):
        run_stages(labelling(labeller=nothing))
    assert (folder / "runs/single/labels/index.parquet").exists()
    run_stages(labelling(labeller=nothing), may_be_unknown=True)
    assert "unknown: 100.00 %" in capsys.readouterr().out


def test_the_pseudo_labels_figures_go_to_the_run_of_their_weights(folder):
    import mlflow

    tracked = {
        name: replace(stage, tracking=replace(stage.tracking, kind="mlflow", system_metrics=False))
        if isinstance(stage, RunConfig)
        else stage
        for name, stage in labelling(
            labeller=ActivationLabeller(fusion=FusionConfig(use_crf=False))
        ).items()
    }
    run_stages(tracked, may_be_unknown=True)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("memseg-dist").experiment_id])
    assert run.info.run_name == "single" and run.info.status == "FINISHED"
    assert {"pseudo labels/images", "losses/all"} <= run.data.metrics.keys()


def test_a_stop_that_comes_after_the_last_step_keeps_the_next_stage_from_starting(monkeypatch):
    launched = []

    def finish_too_soon(config: RunConfig) -> dict:
        with process.heeding_stop_signals(lambda: None):
            os.kill(os.getpid(), signal.SIGTERM)
        launched.append(config.name)
        return {"status": "finished"}

    monkeypatch.setattr(pipeline, "launch", finish_too_soon)
    monkeypatch.setattr(pipeline, "check_weights", lambda name, stages: None)
    run = toy_job.stages(toy_job.Options())["train"]
    stages = {"first": replace(run, name="a"), "second": replace(run, name="b")}
    assert not run_stages(stages) and launched == ["a"]
    assert run_stages({"only": run})  # which is done


def test_labels_that_are_stopped_end_as_a_stopped_run(folder, monkeypatch, capsys):
    toy("--until", "train")

    def interrupt(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("memseg_dist.tools.build.track", interrupt)
    monkeypatch.setattr(pipeline, "export_backbone", lambda stage: None)
    run = parsed()["train"]
    stages = {"train": run, "labels": LabelConfig(run.directory, "data", "out", ArgmaxLabeller())}
    with pytest.raises(SystemExit) as caught:
        main(toy_job.Options, lambda _: stages, toy_job.vocabularies, "", ("--start-at", "labels"))
    assert caught.value.code == os.EX_TEMPFAIL
    assert "whole shards are kept" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_exported(folder):
    toy("--until", "train")
    run = parsed()["train"]
    weights = max(Path(run.directory).glob("checkpoints/*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{weights} is damaged"):
        export_backbone(ExportConfig(run.directory, "out.safetensors"))
    assert not list(Path().glob("*out*"))


def test_the_flags_in_an_error_are_those_of_the_stage():
    text = "exclude them, --sources.0.exclude and --validation.exclude"
    assert named_flags(text, "train", True) == text
    named = "exclude them, --train.sources.0.exclude and --train.validation.exclude"
    assert named_flags(text, "train", False) == named
