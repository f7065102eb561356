"""Class lists of a user's own data: reading them, giving uids to names, finding a class by name.

A class without a uid gets that of the same-named class of another vocabulary, so that both are one
class in a label space, else "name:<its name>".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memseg_dist.data.files import read_bytes
from memseg_dist.data.vocabulary import Category, Vocabulary

NO_UID = "?"


def read_classes(path: Path, uids: Path | None = None) -> Vocabulary:
    """A class list (see the module's text); ValueError for one that cannot be read."""
    if path.suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict) and "categories" in content:
            return Vocabulary.from_json(content, origin=str(path))
        names = content.get("classes") if isinstance(content, dict) else content
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{path}: expected [names], {{"classes": [names]}} or a vocabulary')
        categories = [Category(NO_UID, name) for name in names]
    else:
        lines = [
            line.split("\t") for line in read_bytes(path).decode().splitlines() if line.strip()
        ]
        categories = [_from_columns(line) for line in lines]
    if not categories:
        raise ValueError(f"{path}: no classes in it; write one name a line")
    return Vocabulary(tuple(fill_uids(categories, uids, path)), origin=str(path))


def _from_columns(columns: Sequence[str]) -> Category:
    name, uid, synonyms = (*(column.strip() for column in columns), "", "")[:3]
    others = tuple(text.strip() for text in synonyms.split(",") if text.strip())
    return Category(uid or NO_UID, name, others)


def fill_uids(categories: Sequence[Category], uids: Path | None, origin: Path) -> list[Category]:
    """Fill in uids that are not given, from a vocabulary by name, else from the name."""
    known: dict[str, Category] = {}
    if uids:
        reference = Vocabulary.load(uids).categories
        for item in reference:  # a name of its own goes before another class's synonym
            known.setdefault(_fold(item.name), item)
        for item in reference:
            for synonym in item.synonyms:
                known.setdefault(_fold(synonym), item)
    filled = []
    for category in categories:
        if category.uid != NO_UID:
            filled.append(category)
        elif (match := known.get(_fold(category.name))) is not None:
            names = [name for name in (match.name, *match.synonyms) if name != category.name]
            filled.append(Category(match.uid, category.name, (*category.synonyms, *names)))
        else:
            filled.append(replace(category, uid=name_uid(category.name)))
    seen: dict[str, str] = {}
    for category in filled:
        if category.uid in seen:
            raise ValueError(
                f"{origin}: classes {seen[category.uid]!r} and {category.name!r} both get uid "
                f"{category.uid!r}; give them uids in the class list"
            )
        seen[category.uid] = category.name
    return filled


def name_uid(name: str) -> str:
    return f"name:{_fold(name)}"


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def finder(vocabulary: Vocabulary) -> Callable[[str, str], int]:
    """find(label, where) -> local id of a name, synonym or uid."""
    known: dict[str, int] = {}
    for spelling in ("uid", "name"):
        for local, category in enumerate(vocabulary.categories):
            known.setdefault(getattr(category, spelling), local)
    for local, category in enumerate(vocabulary.categories):
        for spelled in category.spellings():
            known.setdefault(spelled, local)

    def find(label: str, where: str) -> int:
        local = known.get(label, known.get(_fold(label)))
        if local is None:
            raise ValueError(f"{where}: label {label!r} is not in the class list; add it there")
        return local

    return find


def read_json(path: Path) -> Any:
    content = read_bytes(path)
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
