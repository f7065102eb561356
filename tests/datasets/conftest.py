"""Recipes are files, not a package: they are loaded by path. And tiny pictures to feed them."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

RECIPES = Path(__file__).resolve().parents[2] / "datasets"


def load(name: str) -> ModuleType:
    key = f"recipe_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, RECIPES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    return sys.modules[key]


@pytest.fixture(scope="session")
def load_recipe():
    """`load_recipe("folder")` -> the module datasets/folder.py."""
    return load


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
    from memseg_dist.runtime.build import BuildOptions

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
