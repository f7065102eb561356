"""Classes by what people call them: uid, name or synonym."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from memseg_dist.data.vocabulary import Vocabulary, fold


def find_classes(vocabulary: Vocabulary, wanted: Sequence[str]) -> list[int]:
    """The ids of `wanted`, in that order, each once. ValueError for an unknown or unclear one."""
    index: dict[str, list[int]] = {}
    for class_id, category in enumerate(vocabulary.categories):
        for spelling in category.spellings():
            index.setdefault(spelling, []).append(class_id)
    return list(dict.fromkeys(_find(vocabulary, index, text.strip()) for text in wanted))


def _find(vocabulary: Vocabulary, index: dict[str, list[int]], text: str) -> int:
    """A uid counts before a name, a name before a synonym."""
    if text in vocabulary:
        return vocabulary.index(text)
    found = index.get(fold(text), [])
    named = [class_id for class_id in found if fold(vocabulary.names[class_id]) == fold(text)]
    found = named or found
    if len(found) == 1:
        return found[0]
    if found:
        meanings = ", ".join(f"{vocabulary.uids[i]} ({vocabulary.names[i]})" for i in found)
        raise ValueError(f"{text!r} is the name of {len(found)} classes: {meanings}; give a uid")
    near = difflib.get_close_matches(fold(text), index, n=5, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(
        f"{text!r} is no uid, name or synonym of the {len(vocabulary)} known classes{hint}"
    )
