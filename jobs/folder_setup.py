"""What the jobs for your own pictures share: the classes of folders of shards, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memseg_dist.data.vocabulary import BACKGROUND, Category, Vocabulary
from memseg_dist.pipeline import JobOptions


@dataclass(frozen=True)
class MaskOptions(JobOptions):
    """Your own pictures with masks."""

    masks: str = "shards/train"
    """Shards with pixel masks."""
    val: str = "shards/val"
    """Shards with masks to score on; every class of their vocabulary competes."""
    crop: int = 512
    """Side of the training crops in pixels; the shortest side of a picture is scaled to it."""

    def vocabularies(self, **others: str) -> dict[str, Vocabulary]:
        """Of these shards, and of others by the names of their sources."""
        paths = {"masks": self.masks, "val": self.val} | others
        return read_vocabularies(paths, smoke=self.smoke)


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
