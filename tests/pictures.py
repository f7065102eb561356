"""Tiny pictures and a reader of shards, for the tests of recipes and of what writes shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def jpeg(seed: int = 0, size: tuple[int, int] = (16, 12)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (16, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed, size))


def write_map(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def picture_files():
    """(write_image, write_map, jpeg) as functions."""
    return write_image, write_map, jpeg


@pytest.fixture
def options(tmp_path):
    """`options(**changes)`: build in this process into tmp_path/out."""
    from memseg_dist.tools.build import BuildOptions

    return lambda **changes: BuildOptions(**{"out": tmp_path / "out", "workers": 0, **changes})


@pytest.fixture(scope="session")
def read_back():
    """`read_back(root)` -> {key: (image bytes, labels, mask or None)}, straight from the tars."""
    import json
    import tarfile

    def read(root: Path) -> dict[str, tuple[bytes, list[int], np.ndarray | None]]:
        members: dict[str, dict[str, bytes]] = {}
        for path in sorted(root.glob("shard-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    content = tar.extractfile(member)
                    assert content is not None
                    members.setdefault(key, {})[extension] = content.read()
        return {
            key: (
                parts["jpg"],
                json.loads(parts["json"])["labels"],
                np.array(Image.open(io.BytesIO(parts["mask.png"])))
                if "mask.png" in parts
                else None,
            )
            for key, parts in members.items()
        }

    return read
