"""Class lists and the label space that several of them share.

A class is its uid (a WordNet synset where there is one); names are for people. Local ids count the
classes of one data set from 0, label-space ids count the classes of the union.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memseg_dist.checks import require
from memseg_dist.data.files import read_json, write_atomically
from memseg_dist.jsonable import decode

VOCABULARY_FORMAT = 1
BACKGROUND = "background"
"""Uid and name of the class of all that has no label of its own."""
_BACKGROUND_UIDS = (BACKGROUND, f"name:{BACKGROUND}")
"""The second is what class lists used to give it. A synset of that name (n02769075: what is painted
behind a stage) is a class like any other."""


def fold(name: str) -> str:
    """A name with case, '_', '-' and runs of spaces levelled."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def is_background(uid: str) -> bool:
    return uid in _BACKGROUND_UIDS


@dataclass(frozen=True)
class Category:
    """One class: a stable uid, the name to show, other names of the same thing."""

    uid: str
    name: str
    synonyms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "synonyms", tuple(self.synonyms))
        if not (isinstance(self.uid, str) and self.uid and isinstance(self.name, str)):
            raise ValueError(
                f"category with uid {self.uid!r} and name {self.name!r}: both must be text and the "
                "uid must not be empty"
            )

    def spellings(self) -> set[str]:
        """All names as `fold` levels them, for telling whether two mean the same."""
        return {fold(text) for text in (self.name, *self.synonyms)}


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a data set; a class's local id is its position. `origin` is for messages."""

    categories: tuple[Category, ...]
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))
        seen: dict[str, int] = {}
        for local, category in enumerate(self.categories):
            if category.uid in seen:
                raise ValueError(
                    f"vocabulary {self._where}: uid {category.uid!r} is given twice, as class "
                    f"{seen[category.uid]} and as class {local}; give every class its own uid "
                    "(LabelSpace.union(relabel=...) merges classes)"
                )
            seen[category.uid] = local

    @property
    def _where(self) -> str:
        return self.origin or "in memory"

    def __len__(self) -> int:
        return len(self.categories)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(category.name for category in self.categories)

    @cached_property
    def uids(self) -> tuple[str, ...]:
        return tuple(category.uid for category in self.categories)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {uid: local for local, uid in enumerate(self.uids)}

    def __contains__(self, uid: object) -> bool:
        return uid in self._ids

    def index(self, uid: str) -> int:
        """The id of `uid`; KeyError names the uid, this vocabulary and the nearest known uid."""
        if uid not in self._ids:
            near = difflib.get_close_matches(uid, self.uids, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise KeyError(
                f"vocabulary {self._where}: no class has uid {uid!r} "
                f"({len(self)} classes are known){hint}"
            )
        return self._ids[uid]

    def index_pairs(
        self, pairs: Sequence[tuple[str, str]], where: str
    ) -> tuple[tuple[int, int], ...]:
        """The ids of pairs of uids; ValueError names an unknown uid and, first, `where`."""
        try:
            return tuple((self.index(one), self.index(other)) for one, other in pairs)
        except KeyError as error:
            raise ValueError(f"{where}: {error.args[0]}") from error

    def to_json(self) -> dict[str, Any]:
        categories = [{**vars(item), "synonyms": [*item.synonyms]} for item in self.categories]
        return {"format": VOCABULARY_FORMAT, "categories": categories}

    @classmethod
    def from_json(cls, value: Any, origin: str = "") -> Vocabulary:
        saved = decode(_SavedVocabulary, value, f"vocabulary {origin or 'in memory'}")
        return cls(saved.categories, origin)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """From a local path or an fsspec URL."""
        return cls.from_json(read_json(path), origin=str(path))

    def save(self, path: str | Path) -> None:
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=1)
        write_atomically(path, text.encode())


@dataclass(frozen=True)
class _SavedVocabulary:
    format: int
    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        wanted = f"{VOCABULARY_FORMAT}, as Vocabulary.save writes it"
        require(self.format == VOCABULARY_FORMAT, "format", self.format, wanted)


Relabelling = Mapping[str, Mapping[str, Category]]


@dataclass(frozen=True, eq=False)
class LabelSpace:
    """The union of several vocabularies, keyed by uid, in the order of first appearance.

    to_union: per source, int32 [local classes]: local id -> label-space id. Several local ids may
    share one label-space id when a relabelling merged them.
    """

    vocabulary: Vocabulary
    to_union: Mapping[str, NDArray[np.int32]]

    @classmethod
    def union(
        cls, vocabularies: Mapping[str, Vocabulary], relabel: Relabelling | None = None
    ) -> LabelSpace:
        """`relabel` states, per source, the class that a local uid stands for in the union.

        ValueError if two sources define one uid with no name in common, or if a relabelling names
        a source or a uid that is not there.
        """
        relabel = relabel or {}
        for source in relabel:
            if source not in vocabularies:
                raise ValueError(f"relabelling of source {source!r}: known are {[*vocabularies]}")
        merged: dict[str, list[tuple[Category, str]]] = {}
        to_union = {}
        for source, vocabulary in vocabularies.items():
            changes = relabel.get(source, {})
            for uid in changes:
                if uid not in vocabulary:
                    raise ValueError(
                        f"relabelling of source {source!r}: its vocabulary {vocabulary.origin} has "
                        f"no class with uid {uid!r}; remove it from the relabelling"
                    )
            where = vocabulary.origin or f"of source {source!r}"
            targets = [changes.get(item.uid, item) for item in vocabulary.categories]
            for target in targets:
                merged.setdefault(target.uid, []).append((target, where))
            union_ids = {uid: number for number, uid in enumerate(merged)}
            ids = [union_ids[target.uid] for target in targets]
            to_union[source] = np.array(ids, dtype=np.int32)
        categories = tuple(_merge(same) for same in merged.values())
        backgrounds = {uid: same[0][1] for uid, same in merged.items() if is_background(uid)}
        if len(backgrounds) > 1:
            raise ValueError(
                f"the background has several uids, by vocabulary: {backgrounds}; it would be as "
                f"many classes. Write the shards anew, with uid {BACKGROUND!r}, or relabel them"
            )
        return cls(Vocabulary(categories, origin="of the label space"), to_union)

    def ids(self, source: str) -> NDArray[np.int32]:
        """Local id -> label-space id of `source`; ValueError if it is unknown."""
        if source not in self.to_union:
            raise ValueError(
                f"source {source!r} is not in the label space; known are {[*self.to_union]}"
            )
        return self.to_union[source]

    def classes(self, source: str) -> NDArray[np.int32]:
        """The source's label-space ids, ascending, each once."""
        return np.unique(self.ids(source))

    def multiplicity(self, source: str) -> NDArray[np.int64]:
        """How many local classes each of `classes(source)` stands for."""
        return np.unique(self.ids(source), return_counts=True)[1]

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelSpace) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        to_union = {source: ids.tolist() for source, ids in self.to_union.items()}
        return {"vocabulary": self.vocabulary.to_json(), "to_union": to_union}

    @classmethod
    def from_json(cls, value: Any, where: str = "label space") -> LabelSpace:
        """The inverse of `to_json`; ValueError naming the file `where`."""
        saved = decode(_SavedLabelSpace, value, where)
        vocabulary = Vocabulary(saved.vocabulary.categories, origin="of the label space")
        to_union = {name: np.array(ids, dtype=np.int32) for name, ids in saved.to_union.items()}
        return cls(vocabulary, to_union)


@dataclass(frozen=True)
class _SavedLabelSpace:
    vocabulary: _SavedVocabulary
    to_union: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        num_classes = len(self.vocabulary.categories)
        for source, ids in self.to_union.items():
            outside = [number for number in ids if not 0 <= number < num_classes]
            require(not outside, f"to_union.{source}", outside[:5], f"ids of {num_classes} classes")


def _merge(same: Sequence[tuple[Category, str]]) -> Category:
    """One class of the union from what the sources (category, where) call it."""
    first, origin = same[0]
    spellings: set[str] = set()
    for category, where in same:
        if spellings and spellings.isdisjoint(category.spellings()):
            raise ValueError(
                f"uid {category.uid!r} means {first.name!r} in vocabulary {origin} but "
                f"{category.name!r} in vocabulary {where}; if they are one class give them a "
                "common name or synonym, else give one of them another uid (or relabel it)"
            )
        spellings |= category.spellings()
    names = dict.fromkeys(name for item, _ in same for name in (item.name, *item.synonyms))
    return Category(first.uid, first.name, tuple(name for name in names if name != first.name))
