"""Fixtures shared by the suite: a pool of real gloo ranks, and the real pictures where there are
any.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from process_pool import ProcessPool

REPOSITORY = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # as the ranks of the pool: a kernel on two threads rounds otherwise


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEMSEG_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def process_pool():
    """`process_pool(world_size).run(function, *args)` -> per-rank results, over real gloo groups.

    The processes are started once per world size and kept for the session. `function` is a
    module-level function of a test file; it runs with the process group initialised.
    """
    pools: dict[int, ProcessPool] = {}

    def get(world_size: int) -> ProcessPool:
        if world_size not in pools:
            pools[world_size] = ProcessPool(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images for checks; tests that need it are skipped visibly where it is
    absent.
    """
    root = Path(os.environ.get("MEMSEG_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real images at {root}; set MEMSEG_REAL_DATA")
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The shards of `platforms.tiny_run`."""
    from platforms.tiny_run import draw

    root = tmp_path_factory.mktemp("tiny-data")
    draw(root)
    return root
