"""Small generated data sets for the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.made import write


@pytest.fixture(scope="session")
def masks_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 samples with masks in shards of uneven size; not to be changed."""
    return _made(tmp_path_factory, "masks", with_masks=True, sizes=(5, 3, 6, 1, 2))


@pytest.fixture(scope="session")
def labels_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 samples with image labels only; not to be changed."""
    return _made(tmp_path_factory, "labels", with_masks=False, sizes=(4, 4, 6))


def _made(factory: pytest.TempPathFactory, name: str, with_masks: bool, sizes) -> Path:
    root = factory.mktemp(name)
    patch = pytest.MonkeyPatch()
    patch.setenv("MEMSEG_CACHE", str(factory.mktemp("cache")))
    write(root, sizes, with_masks)
    patch.undo()
    return root
