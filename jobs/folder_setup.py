"""What the jobs for your own pictures share: the classes of folders of shards, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memseg_dist.data.vocabulary import Category, Vocabulary

BACKGROUND = "background"
"""Uid of the class of all that has no label."""


def labelled(paths: Sequence[str]) -> dict[str, str]:
    """Shards with image labels by the name of their source."""
    return {f"labels_{number}": path for number, path in enumerate(paths)}


def read_vocabularies(
    paths: Mapping[str, str], *, smoke: bool, names: Sequence[str] = ("ant", "bee", "cat")
) -> dict[str, Vocabulary]:
    """Of the shards in `paths`; with `smoke` of none, but classes of these names."""
    if smoke:
        uids = [name if name == BACKGROUND else f"name:{name}" for name in names]
        made_up = Vocabulary(tuple(map(Category, uids, names)))
        return dict.fromkeys(paths, made_up)
    return {name: Vocabulary.load(f"{path}/vocabulary.json") for name, path in paths.items()}
