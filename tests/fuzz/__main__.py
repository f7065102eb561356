"""`make fuzz CASES=20000`: that many cases, dealt out to the kinds, and a table of what came."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import tyro
from fuzz.fuzzer import run
from fuzz.kinds import KINDS

OUTCOMES = ("refused", "skipped", "right", "failed")


def main(cases: int = 2000, first: int = 0, kind: str = "") -> None:
    """Read damaged files; exit status 1 if any was read wrongly.

    Args:
        cases: How many, in all.
        first: The first seed.
        kind: This one alone.
    """
    names = [kind] if kind else [*KINDS]
    print(f"| kind | cases | {' | '.join(OUTCOMES)} | seconds |\n|{' --- |' * (len(OUTCOMES) + 3)}")
    found = []
    for number, name in enumerate(names):
        start, count = time.perf_counter(), cases // len(names) + (number < cases % len(names))
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
            os.environ["MEMSEG_CACHE"] = cache
            outcomes, failures = run(name, range(first, first + count), Path(folder))
        figures = " | ".join(str(outcomes[outcome]) for outcome in OUTCOMES)
        print(f"| {name} | {count} | {figures} | {time.perf_counter() - start:.0f} |", flush=True)
        found += failures
    if found:
        sys.exit("\n" + "\n".join(found))


if __name__ == "__main__":
    tyro.cli(main)
