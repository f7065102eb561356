"""The commands by name, and how errors end.

A command's module is imported when the command is asked for: `memseg --help` needs none of torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

import tyro
from tyro.extras import SubcommandApp

from memseg_dist.checks import require

DESCRIPTION = "Use, score and inspect what a run has learned."
GROUPS = {
    "bank": "Look into the memory of a run.",
    "data": "Index, check and split data sets.",
}
COMMANDS = {
    "predict": ("predict:predict", "Segment pictures and folders of pictures."),
    "eval": ("score:score", "Score a checkpoint on shards with masks."),
    "label": ("label:label_command", "Write pseudo labels."),
    "bank inspect": ("bank:inspect", "Show what the memory holds, the coldest classes first."),
    "bank search": (
        "bank:search",
        "Find the classes (or single rows) of the memory that are nearest by cosine.",
    ),
    "data index": ("data:index", "Index WebDataset shards that others made."),
    "data split": ("split:split", "Make splits of a data set."),
    "data verify": ("data:verify", "Decode every member of a data set's shards."),
}
"""Where a command's function is, "module:function" beside this file, and how its docstring begins.
"""


def command_function(name: str, arguments: Sequence[str]) -> Callable[..., None]:
    """The function of a command, whose flags may depend on the `arguments`."""
    module, function = COMMANDS[name][0].split(":")
    found = getattr(importlib.import_module(f"memseg_dist.cli.{module}"), function)
    return found(arguments) if name == "label" else found


def commands(arguments: Sequence[str]) -> SubcommandApp:
    """All commands; those that `arguments` do not ask for are there by name alone."""
    apps = {"": SubcommandApp()} | {name: SubcommandApp() for name in GROUPS}
    completes = any(argument.startswith("--tyro-") for argument in arguments)
    for name, (_, summary) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if completes or [*arguments[: name.count(" ") + 1]] == name.split():
            apps[group].command(name=last)(command_function(name, arguments))
        else:
            apps[group].command(name=last, help=summary)(_not_asked_for)
    for name, summary in GROUPS.items():
        apps[""].command(apps[name], name=name, help=summary)
    return apps[""]


def _not_asked_for() -> None:
    raise AssertionError("commands() imports what the command line asks for")


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit status 0 when done, 1 with one readable message, 2 for a wrong command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        for word in arguments:
            require("\0" not in word, "argument", word, "text without a zero byte")
        commands(arguments).cli(
            prog="memseg",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:  # nothing that was named on the command line
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}; give another path")
    except KeyboardInterrupt:
        sys.exit(130)
