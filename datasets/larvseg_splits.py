"""Named split protocols: which classes of several data sets are one class, and which are novel.

    result = split("wordnet", {"coco_stuff": c171, "ade": a150}, masks=["coco_stuff"], test="ade")
    LabelSpace.union(vocabularies, result.relabel);  result.base, result.novel

`wordnet` (for new work): classes are equal if their uids are; COCO-Stuff's kinds of wall, floor and
ceiling count as wall, floor and ceiling. The others follow the names that LarvSeg's published lists
used, so that its tables can be compared with (base / novel classes of ADE20K 150 and 847):
    table3       58/92, 92/755   pixel-labelled names cut at the first "-", then exact equality
    head         63/87, 94/753   the same, after five renames by hand
    normalised   63/87, 98/749   as `head`, with "-" and "_" read as spaces
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary

Protocol = Literal["wordnet", "table3", "head", "normalised"]
Spelling = Literal["spaces", "hyphens", "underscores"]

HEAD_RENAMES = {
    "tv": "television receiver",
    "window-other": "windowpane",
    "window-blind": "blind",
    "dirt": "dirt track",
    "wine glass": "glass",
}
"""COCO-Stuff name -> the ADE20K name that LarvSeg's code gives it."""

PUBLISHED_SPELLING: Mapping[str, Spelling] = {
    "ade20k_847": "hyphens",
    "imagenet_585": "hyphens",
    "imagenet21k": "underscores",
}
"""How the published lists join the words of a name, by vocabulary file; elsewhere by spaces."""

_COARSE = {
    "wall": Category("n04546855", "wall"),
    "floor": Category("n03365592", "floor", ("flooring",)),
    "ceiling": Category("n02990373", "ceiling"),
    "ground": Category("name:ground", "ground"),
    "textile": Category("n03309808", "fabric", ("cloth", "material", "textile")),
}


@dataclass(frozen=True)
class Split:
    """relabel: per source, local uid -> class of the union (for LabelSpace.union).

    base, novel: uids of the union; the test vocabulary's classes that a pixel-labelled source has,
    and has not. num_classes: of the whole union.
    """

    protocol: Protocol
    relabel: Mapping[str, Mapping[str, Category]]
    base: frozenset[str]
    novel: frozenset[str]
    num_classes: int


def split(
    protocol: Protocol,
    vocabularies: Mapping[str, Vocabulary],
    *,
    masks: Sequence[str],
    test: str,
    spelling: Mapping[str, Spelling] | None = None,
) -> Split:
    """Relabel all sources by `protocol` and divide the test classes into base and novel.

    masks: the sources with pixel labels; test: the source that is scored.
    spelling: per source, how its published list joins words; by default from its file's name
    (PUBLISHED_SPELLING). `wordnet` and `normalised` do not depend on it.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"split protocol {protocol!r}: known are {list(get_args(Protocol))}")
    for source in (*masks, test, *(spelling or {})):
        if source not in vocabularies:
            known = [*vocabularies]
            raise ValueError(f"split protocol {protocol}: no source {source!r}; known are {known}")
    relabel: dict[str, dict[str, Category]] = {}
    for source, vocabulary in vocabularies.items():
        if protocol == "wordnet":
            relabel[source] = _coarse(vocabulary)
        else:
            words = (spelling or {}).get(source) or published_spelling(vocabulary)
            relabel[source] = {
                category.uid: _by_name(category, protocol, source in masks, words)
                for category in vocabulary.categories
            }
    space = LabelSpace.union(vocabularies, relabel)
    uids = space.vocabulary.uids
    tested = {uids[index] for index in space.classes(test)}
    trained = {uids[index] for source in masks for index in space.classes(source)}
    base, novel = frozenset(tested & trained), frozenset(tested - trained)
    return Split(protocol, relabel, base, novel, len(space))


def published_spelling(vocabulary: Vocabulary) -> Spelling:
    return PUBLISHED_SPELLING.get(Path(vocabulary.origin).stem, "spaces")


def _coarse(vocabulary: Vocabulary) -> dict[str, Category]:
    changes = {}
    for item in vocabulary.categories:
        kind, _, detail = item.name.partition("-")
        if item.uid.startswith("coco:") and kind in _COARSE:
            changes[item.uid] = _COARSE[kind]
        elif detail in ("other", "stuff"):
            changes[item.uid] = Category(item.uid, kind, (item.name, *item.synonyms))
    return changes


def _by_name(category: Category, protocol: Protocol, is_masks: bool, words: Spelling) -> Category:
    """The class that stands for every category of this (edited) name."""
    name = category.name
    if is_masks:
        renamed = HEAD_RENAMES.get(name) if protocol in ("head", "normalised") else None
        name = renamed or name.partition("-")[0]
    if protocol == "normalised":
        name = " ".join(name.replace("-", " ").replace("_", " ").split())
    else:
        joint = {"spaces": " ", "hyphens": "-", "underscores": "_"}[words]
        name = name.replace(" ", joint)
    return Category(f"name:{name}", name)
