from __future__ import annotations

from pathlib import Path

import pytest
from runtime.tiny_run import draw


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tiny-data")
    draw(root)
    return root
