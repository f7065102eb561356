"""Damaged files and command lines: refused by name, skipped and counted, or read right."""

import pytest
from fuzz.fuzzer import run
from fuzz.kinds import KINDS

CASES = 200  # per kind; `make fuzz CASES=20000` for more


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, tmp_path):
    outcomes, failures = run(kind, range(CASES), tmp_path)
    assert not failures, "\n\n".join(failures)
    assert outcomes["right"] and outcomes["refused"] + outcomes["skipped"], outcomes
