"""Recipes are files, not a package: they are loaded by path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pictures import options, picture_files, read_back  # noqa: F401

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
