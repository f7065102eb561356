"""Runs cases of a kind and says what came of each.

    outcomes, failures = run("tar", range(200), folder)

A case is a seed: it damages one good file and has the package read it. What may come of it:

    refused    a ValueError, or the commands' exit, with a message that names the file
    skipped    samples are left out, and counted
    right      the content before the damage; where no checksum guards it, what the file says now

All else is a failure: another exception, a message without the name, other data, a sample lost,
more than BYTES of memory or SECONDS of CPU time.
"""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from fuzz.kind import Kind
from fuzz.kinds import KINDS

BYTES = 1 << 30
SECONDS = 20
_LONGEST_MESSAGE = 4000


class Hang(BaseException):
    """No Exception, so that nobody takes it for one of a reader."""


def run(name: str, seeds: Iterable[int], folder: Path) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and the failures, each with what repeats it."""
    variants = []
    for variant in KINDS[name]:
        (folder / variant.__name__).mkdir()
        variants.append(variant(folder / variant.__name__))
    outcomes: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        random = Random(f"{name} {seed}")
        kind = random.choice(variants)
        try:
            with _quiet(), _bounded():
                outcome = _case(kind, random)
        except (Exception, Hang):
            outcome = "failed"
            failures.append(
                f"{name}, seed {seed}: {type(kind).__name__}, {kind.what}\n"
                f"repeat it by: make fuzz KIND={name} FIRST={seed} CASES=1\n"
                f"{traceback.format_exc(limit=-8)}"
            )
        outcomes[outcome] += 1
    return outcomes, failures


def _case(kind: Kind, random: Random) -> str:
    kind.what = "not damaged yet"
    kind.damage(random)
    try:
        return kind.read()
    except ValueError as error:
        message = str(error)
        assert type(error).__module__ != "json.decoder" and "Traceback" not in message, message
        assert kind.is_named(message), f"{kind.path} is not named in: {message}"
        assert len(message) < _LONGEST_MESSAGE, f"a message of {len(message)} characters"
        return "refused"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Hang after so much CPU time, AssertionError if more memory was held at a time."""

    def stop(*_: object) -> None:
        raise Hang(f"no end after {SECONDS} s of CPU time")

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    taken = _peak() - before
    assert taken < BYTES, f"{taken >> 20} MiB of memory were taken"


def _peak() -> int:
    """Bytes that this process has held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
