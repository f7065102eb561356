"""The command `memseg`: use, score and inspect what a run has learned."""

from memseg_dist.cli.main import main

__all__ = ["main"]
