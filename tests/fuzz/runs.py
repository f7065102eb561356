"""What a run is told and leaves behind: configs, checkpoints, memories, command lines."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import torch
import toy_job
from fuzz.kind import RIGHT, SKIPPED, Kind, Text, says
from fuzz.mutations import damage, damage_tree
from memory.digest import digest_of
from pictures import jpeg
from PIL import Image
from train.shards import larvseg_config, write_squares
from train.tiny import Tiny, save, tiny_config

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import Clock
from memseg_dist.cli import main
from memseg_dist.config import EngineConfig, OptimizerConfig, from_json, to_json
from memseg_dist.data.files import read_text
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.jsonable import encode
from memseg_dist.memory.layouts import Rings
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Overwrite
from memseg_dist.methods.method import MethodConfig
from memseg_dist.pipeline import parse
from memseg_dist.stages import read_by, resolved
from memseg_dist.tools.search import PublishedRows
from memseg_dist.train.checkpoint import Checkpoint, latest
from memseg_dist.train.checkpoint import load as load_checkpoint
from memseg_dist.train.engine import TorchEngine

CONFIG = tiny_config(OptimizerConfig("adamw", lr=0.1))
CATEGORIES = (Category("n0", "cat"), Category("n1", "dog"), Category("n2", "lion"))


def filled_bank() -> ShardedRows:
    bank = ShardedRows(Rings(4, 2), Overwrite(), 3)
    for step in range(3):
        bank.propose([0, 2, 3 - step], torch.arange(9.0).view(3, 3) + 100 * step, Clock(step))
        bank.commit(Clock(step))
    return bank


class Bank(Kind):
    """A published memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        filled_bank().publish(folder / "bank", ["n0", "n1", "n2", "n3"])
        (self.path,) = (folder / "bank").iterdir()
        self.whole = self.path.read_bytes()
        self.expected = PublishedRows.open(self.path.parent)

    def damage(self, random: Random) -> None:
        content, self.what = damage(self.whole, random)
        self.path.write_bytes(content)

    def read(self) -> str:
        found = PublishedRows.open(self.path.parent)
        for name, expected in vars(self.expected).items():
            assert np.array_equal(getattr(found, name), expected), name
        return RIGHT


class Config(Text):
    """The config of a run with each of the methods, as a checkpoint keeps it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "config.json"
        config = larvseg_config(Path("/data"), Path("/runs"))
        self.whole = tuple(
            to_json(replace(config, method=kind())).encode() for kind in MethodConfig.kinds.values()
        )

    def read(self) -> str:
        config = from_json(read_text(self.path), str(self.path))
        assert says(encode(config), json.loads(self.path.read_bytes()))
        assert from_json(to_json(config)) == config
        return RIGHT


DATA = {"source0": "0123456789abcdef"}
"""The fingerprints that a checkpoint keeps."""


class CheckpointFiles(Kind):
    """A file of a checkpoint, with or without a manifest that fits the damage."""

    LABELS = LabelSpace.union({"source0": Vocabulary(CATEGORIES)})

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        engine = TorchEngine(Tiny(), CONFIG, torch.device("cpu"))
        bank = filled_bank()
        directory = str(folder / "run")
        save(directory, 7, engine, {"bank": bank}, CONFIG, self.LABELS, data=DATA, keep=1)
        self.step = folder / "run" / "step-00000007"
        self.files = {file.name: file.read_bytes() for file in self.step.iterdir()}
        self.expected = (engine.state().weights, digest_of(bank, values=True))

    def damage(self, random: Random) -> None:
        for name, content in self.files.items():
            (self.step / name).write_bytes(content)
        name = random.choice([*self.files, "manifest.json"])
        self.path, content = self.step / name, self.files[name]
        is_tree = name.endswith(".json") and random.random() < 0.7
        content, self.what = (
            damage_tree(json.loads(content), random) if is_tree else damage(content, random)
        )
        self.what = f"{name}: {self.what}"
        self.path.write_bytes(content)
        self.is_sealed = name != "manifest.json" and random.random() < 0.6
        if self.is_sealed:
            manifest = json.loads(self.files["manifest.json"])
            entry = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
            manifest["files"][name] = entry
            (self.step / "manifest.json").write_text(json.dumps(manifest))

    def is_named(self, message: str) -> bool:
        return str(self.step) in message

    def read(self) -> str:
        is_torn = latest(str(self.step.parent)) is None  # then a warning names it
        try:
            self.load()
        except ValueError as error:
            if is_torn and self.is_named(str(error)):
                return SKIPPED
            raise
        return SKIPPED if is_torn else RIGHT

    def load(self) -> None:
        engine = TorchEngine(Tiny(), CONFIG, torch.device("cpu"))
        bank = ShardedRows(Rings(4, 2), Overwrite(), 3)
        checkpoint = Checkpoint(str(self.step))
        step = load_checkpoint(checkpoint, engine, {"bank": bank}, CONFIG, self.LABELS, DATA)
        if not self.is_sealed:
            weights, digest = self.expected
            assert step == json.loads((self.step / "manifest.json").read_bytes())["step"]
            assert digest_of(bank, values=True) == digest
            for name, tensor in engine.state().weights.items():
                assert torch.equal(tensor, weights[name]), name


class CommandLine(Kind):
    """Words of which some are wrong. A message names one of them."""

    STRANGE = ("", "nan", "inf", "-inf", "-1", "0", "1e400", "9" * 25, "..", "../..", "\0", "é",
               "\udcff", "a" * 300, "--", "None", "True", "1/0", "1/3", ",", "[1]", "{}", "pipe:x",
               "nope://x/y", "2", "0.5", "-")  # fmt: skip

    def damaged_words(self, words: list[str], random: Random) -> list[str]:
        words, told = [*words], []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            at, other = random.randrange(1, len(words)), random.randrange(1, len(words))
            strange = random.choice(self.STRANGE)
            kind = random.choice(
                ("replace", "replace", "remove", "insert", "swap", "twice", "spell")
            )
            told.append(f"{kind} {at} {words[at][-30:]!r} {strange[:9]!r}")
            if kind == "replace":
                words[at] = strange
            elif kind == "remove" and len(words) > 2:
                del words[at]
            elif kind == "insert":
                words.insert(at, strange)
            elif kind == "swap":
                words[at], words[other] = words[other], words[at]
            elif kind == "twice":
                words.insert(at, words[at])
            else:
                words[at] += random.choice("xs-")
        self.what = f"{words[:2]}: {', '.join(told)}"
        return words

    def is_named(self, message: str) -> bool:
        words = {word.lstrip("-") for word in self.words}
        flags = {word.replace("-", "_") for word in words}
        paths = {os.path.normpath(self.path / word) for word in words}
        named = words | flags | paths
        return any(word in message or repr(word) in message for word in named if word)


class Commands(CommandLine):
    """`memseg`: exit status 1 with a message, 2 with what tyro says, or what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name, num_classes, with_masks in (("masks", 2, 1), ("weak", 4, 0), ("val", 4, 1)):
            write_squares(folder / name, 4, num_classes, with_masks=bool(with_masks))
        config = larvseg_config(folder, folder / "runs", engine=EngineConfig("torch"))
        space = build_label_space(config)
        method = build_method(config, space)
        engine = TorchEngine(method, config, torch.device("cpu"))
        run = str(folder / "runs" / "run")
        save(f"{run}/checkpoints", 5, engine, method.state(), config, space, keep=1)
        filled_bank().publish(folder / "bank", ["n0", "n1", "n2", "n3"])
        self.picture = folder / "one.jpg"
        self.picture.write_bytes(jpeg(0, (20, 16)))
        val, picture = str(folder / "val"), str(self.picture)
        split = f"data split {val} 2 1/2 --seeds 0 1 --rule nested"
        self.lines = [
            split,
            split,
            f"data split {val} 2 --name small --overwrite",
            f"data verify {val}",
            f"data index {val}",
            f"predict {picture} --checkpoint {run} --out out --resize 24 16 --keep-ratio True "
            "--mode slide --window 16 --stride 8 --scales 0.5 1.0 --flip True --classes red,sun",
            f"eval --checkpoint {run} --out out --max-images 1 --panels 1 --device cpu",
            f"bank search --checkpoint {run} --bank {folder}/bank --like sun --neighbours 3",
            f"bank inspect --checkpoint {run} --show 2 --classes sun --out out",
        ]

    def damage(self, random: Random) -> None:
        self.path = self.empty_folder("here") / "deep"
        self.path.mkdir()
        shutil.rmtree(self.folder / "val" / "splits", ignore_errors=True)
        self.words = self.damaged_words(random.choice(self.lines).split(), random)

    def read(self) -> str:
        before = os.getcwd()
        os.chdir(self.path)  # what is written without a whole path
        try:
            main(self.words)
        except SystemExit as stopped:
            if isinstance(stopped.code, str):
                assert stopped.code.startswith("error: ")
                raise ValueError(stopped.code) from stopped
            assert stopped.code in (0, 2)
            if stopped.code == 2:
                raise ValueError(" ".join(self.words)) from stopped  # tyro has shown its own
        finally:
            os.chdir(before)
        for file in (self.folder / "val" / "splits").glob("*.txt"):
            keys = file.read_text().split()
            assert 0 < len(set(keys)) == len(keys) <= 4, file
        for file in self.folder.rglob("one.labels.png"):
            with Image.open(file) as image:
                assert image.size == (20, 16)
        return RIGHT


class JobFlags(CommandLine):
    """The flags of a job: what it says is what the stages get."""

    LINE = (
        "--smoke --name toy --storage runs --seed 3 --train.steps 8 --train.optimizer.lr 0.1 "
        "--train.sources.0.slots 2 --train.sources.0.augment.crop 32 --train.every.log 2 "
        "--train.optimizer.betas 0.9 0.99 --launch.workers 1 --until tune --tune.backbone.name x"
    )

    def damage(self, random: Random) -> None:
        self.path = self.folder
        self.words = self.damaged_words(["job", *self.LINE.split()], random)[1:]

    def read(self) -> str:
        try:
            options, stages = parse(toy_job.Options, toy_job.stages, "", self.words)
            options.select([*stages])
        except SystemExit as stopped:
            assert stopped.code in (0, 2)
            raise ValueError(" ".join(self.words)) from stopped
        for name in stages:
            read_by(stages[name])
        for stage in resolved(stages).values():
            if hasattr(stage, "steps"):
                assert from_json(to_json(stage)) == stage
        return RIGHT
