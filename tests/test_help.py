"""Every flag says what it does, the frequent ones come first, and `memseg --help` is cheap."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import tyro

from memseg_dist.cli.main import COMMANDS, command_function
from memseg_dist.pipeline import MARKERS, command_of, main
from memseg_dist.stages import LABELLERS
from memseg_dist.tools.miniature import shrunk

ROOT = Path(__file__).resolve().parents[1]
JOB = re.compile(r"^    main\(Options, stages", re.MULTILINE)
RECIPE = re.compile(r"(?:command_line\(build, |build\(tyro\.cli\()(\w+)\)")
JOBS = [path.stem for path in sorted((ROOT / "jobs").glob("*.py")) if JOB.search(path.read_text())]
RECIPES = {
    path.stem: found[1]
    for path in sorted((ROOT / "datasets").glob("*.py"))
    if (found := RECIPE.search(path.read_text()))
}


def texts(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The help of every flag, without what tyro says of its default."""
    found = {}
    for action in parser._actions:
        text = action.help() if callable(action.help) else action.help  # tyro's is made when asked
        own = re.sub(r"\((default|required|optional|repeatable)[^()]*(\(.*\))?.*", "", text or "",
                     flags=re.DOTALL)  # fmt: skip
        found[action.option_strings[0] if action.option_strings else action.dest] = own.strip()
    return found


def without_help(target: object, **options: object) -> list[str]:
    flags = texts(tyro.extras.get_parser(target, **options))
    assert len(flags) > 1
    return [flag for flag, text in flags.items() if not text]


@pytest.mark.parametrize("name", JOBS)
def test_every_flag_of_a_job_has_help(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    module = importlib.import_module(name)
    options = module.Options(smoke=True)
    stages = module.stages(options)
    assert not without_help(command_of(options, shrunk(stages)), config=MARKERS)
    assert not without_help(command_of(options, stages), config=MARKERS)


@pytest.mark.parametrize(
    "arguments",
    [*((name,) for name in JOBS), ("larvseg_folder", "--novel", "zebra"), ("rca_voc", "--eps")],
)
def test_help_needs_no_data(monkeypatch, tmp_path, capsys, arguments):
    name, *flags = arguments
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as caught:
        main(module.Options, module.stages, module.vocabularies, None, [*flags, "--help"])
    assert caught.value.code == 0
    assert "steps INT" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_has_help(name):
    kinds = LABELLERS if name == "label" else ("",)
    for kind in kinds:
        function = command_function(name, ["label", "--labeller.kind", kind])
        assert not without_help(function)
        assert (function.__doc__ or "").startswith(COMMANDS[name][1].rstrip("."))


@pytest.mark.parametrize("name", RECIPES)
def test_every_flag_of_a_recipe_has_help(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "datasets"))
    recipe = getattr(importlib.import_module(name), RECIPES[name])
    for kind in get_args(recipe) or (recipe,):  # one of them by sub-command
        assert not without_help(*get_args(kind)[:1] or (kind,))


@dataclass
class Silent:
    told: int = 0
    """It has (brackets) in it."""
    untold: tuple[int, ...] = (1, 2)


def test_a_flag_without_help_is_found():
    assert without_help(Silent) == ["--untold"]


def test_what_is_changed_often_comes_first(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    module = importlib.import_module("mcibi_ade")
    command = command_of(module.Options(), module.stages(module.Options()))
    flags = [*texts(tyro.extras.get_parser(command, config=MARKERS))]
    first = ("--smoke", "--name", "--steps", "--launch.workers", "--backbone.pretrained",
             "--optimizer.lr", "--validation.path", "--sources.0.path")  # fmt: skip
    places = [flags.index(flag) for flag in first]
    assert places == sorted(places)
    assert places[3] < 20


def test_help_of_memseg_imports_no_torch():
    code = (
        "import sys; from memseg_dist.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'ray', 'pyarrow'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout and "bank" in done.stdout
