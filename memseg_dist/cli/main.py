"""The commands by name, and how errors end."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro
from tyro.conf import Positional
from tyro.extras import SubcommandApp

from memseg_dist.cli import bank, label, predict, score
from memseg_dist.data.verify import verify

DESCRIPTION = "Use, score and inspect what a run has learned."


def data_verify(root: Positional[str]) -> None:
    """Decode every member of a data set's shards and check it against the index.

    Args:
        root: Folder or URL with index.parquet and vocabulary.json.
    """
    print(f"{root}: {verify(root)}")


def commands() -> SubcommandApp:
    app, of_bank, of_data = SubcommandApp(), SubcommandApp(), SubcommandApp()
    app.command(name="predict")(predict.predict)
    app.command(name="eval")(score.score)
    app.command(name="label")(label.label)
    of_bank.command(name="inspect")(bank.inspect)
    of_bank.command(name="search")(bank.search)
    of_data.command(name="verify")(data_verify)
    app.command(of_bank, name="bank", help="Look into the memory of a run.")
    app.command(of_data, name="data", help="Check data sets.")
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit status 0 when done, 1 with one readable message, 2 for a wrong command line."""
    try:
        commands().cli(
            prog="memseg",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
