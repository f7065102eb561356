"""The commands by name, and how errors end."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro
from tyro.conf import Positional
from tyro.extras import SubcommandApp

from memseg_dist.checks import require
from memseg_dist.cli import bank, predict, score
from memseg_dist.cli.label import label_command
from memseg_dist.cli.split import split
from memseg_dist.data.index import Index
from memseg_dist.tools.external import ensure_indexed
from memseg_dist.tools.verify import verify

DESCRIPTION = "Use, score and inspect what a run has learned."


def data_verify(root: Positional[str]) -> None:
    """Decode every member of a data set's shards and check it against the index.

    Args:
        root: Folder or URL with index.parquet and vocabulary.json.
    """
    ensure_indexed([root])
    print(f"{root}: {verify(root)}")


def data_index(root: Positional[str]) -> None:
    """Index WebDataset shards that others made: KEY.jpg|png|webp with KEY.cls or KEY.json.

    Args:
        root: Folder or URL with *.tar; the index goes into it if it can be written to.
    """
    ensure_indexed([root])
    print(f"{root}: {Index.open(root)}")


def commands(arguments: Sequence[str]) -> SubcommandApp:
    app, of_bank, of_data = SubcommandApp(), SubcommandApp(), SubcommandApp()
    app.command(name="predict")(predict.predict)
    app.command(name="eval")(score.score)
    app.command(name="label")(label_command(arguments))
    of_bank.command(name="inspect")(bank.inspect)
    of_bank.command(name="search")(bank.search)
    of_data.command(name="index")(data_index)
    of_data.command(name="split")(split)
    of_data.command(name="verify")(data_verify)
    app.command(of_bank, name="bank", help="Look into the memory of a run.")
    app.command(of_data, name="data", help="Index, check and split data sets.")
    return app


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
