"""What a clone has beside the package: the recipes in `datasets/` and their class lists."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from memseg_dist.data.vocabulary import Vocabulary


def recipes() -> Path:
    """The folder `datasets/` of this checkout: beside this package, or beside the job's folder."""
    for root in (Path(__file__).resolve().parents[2], Path(sys.argv[0]).resolve().parents[1]):
        if (root / "datasets" / "vocabularies").is_dir():
            return root / "datasets"
    raise ValueError(
        f"no datasets/vocabularies beside {sys.argv[0]}: run jobs from a clone of memseg-dist"
    )


def vocabulary(name: str) -> Vocabulary:
    """A class list that ships with the recipes, such as `coco_stuff_171`."""
    return Vocabulary.load(recipes() / "vocabularies" / f"{name}.json")


def recipe(name: str) -> ModuleType:
    """The recipe `datasets/NAME.py` as a module. (No package: `datasets` is another's name.)"""
    known = f"memseg_recipe_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, recipes() / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]
