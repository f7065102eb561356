"""What came of a label run, read back from what it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memseg_dist.jsonable import parse
from memseg_dist.tools.build import BuildReport
from memseg_dist.tools.pseudo_labels.scores import PseudoScores
from memseg_dist.tools.pseudo_labels.task import NOTE
from memseg_dist.tools.tar import tar_files

RULE = "unknown_"
"""What the name of a count of pixels that one rule made unknown begins with."""


@dataclass(frozen=True)
class LabelReport:
    """What came of it.

    counts: the notes of all images added up: "pixels", "unknown",
    "labels" (of the images) and what the labeller counts.
    left_out: uid -> images with a label that the run did not train. build: sizes, resumed shards
    and images that could not be read.
    """

    build: BuildReport
    counts: Mapping[str, int]
    num_without_labels: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    scores: PseudoScores | None = None

    @property
    def share_unknown(self) -> float:
        """Of the pixels, 0..1."""
        return self.counts["unknown"] / max(self.counts["pixels"], 1)

    @property
    def unknown_percent(self) -> dict[str, float]:
        """Of the pixels, per rule of the labeller."""
        rules = {name: count for name, count in self.counts.items() if name.startswith(RULE)}
        pixels = max(self.counts["pixels"], 1)
        return {name.removeprefix(RULE): 100 * count / pixels for name, count in rules.items()}

    @property
    def other_counts(self) -> dict[str, int]:
        known = {"pixels", "unknown", "labels"}
        return {n: c for n, c in self.counts.items() if n not in known and not n.startswith(RULE)}

    def __str__(self) -> str:
        lines = [
            f"{self.build.root}: {self.build.num_samples:,} images labelled, "
            f"{self.num_without_labels:,} of them without labels; "
            f"{len(self.build.skipped):,} could not be read",
            f"  unknown: {100 * self.share_unknown:.2f} % of the pixels",
        ]
        lines += [f"    {rule:<16} {share:6.2f} %" for rule, share in self.unknown_percent.items()]
        lines += [f"  {name.replace('_', ' ')}: {n:,}" for name, n in self.other_counts.items()]
        if self.left_out:
            listing = ", ".join(f"{uid} ({count})" for uid, count in [*self.left_out.items()][:8])
            lines.append(f"  left out, since the run did not train them (images): {listing}")
        return "\n".join([*lines, *([str(self.scores)] if self.scores else [])])

    def metrics(self, prefix: str = "label/") -> dict[str, float]:
        """What a tracker plots."""
        figures: dict[str, float] = {
            "images": self.build.num_samples,
            "images_without_labels": self.num_without_labels,
            "unknown_percent": 100 * self.share_unknown,
            **{f"unknown_percent_{rule}": share for rule, share in self.unknown_percent.items()},
            **self.other_counts,
        }
        scores = self.scores.metrics(f"{prefix}truth_") if self.scores else {}
        return {f"{prefix}{name}": float(value) for name, value in figures.items()} | scores


def read_report(
    built: BuildReport, left_out: Mapping[str, int], scores: PseudoScores | None
) -> LabelReport:
    """The report of what `built` wrote, this time and before."""
    counts, num_without = Counter[str](), 0
    for sample in _jsons(built.root):
        counts.update(sample[NOTE])
        num_without += not sample[NOTE]["labels"]
    return LabelReport(built, counts, num_without, left_out, scores)


def _jsons(root: Path) -> Iterator[dict[str, Any]]:
    """What each written sample's JSON holds."""
    for path in sorted(root.glob("shard-*.tar")):
        with open(path, "rb") as stream:
            for file in tar_files(stream, path):
                if file.name.endswith(".json"):
                    stream.seek(file.offset_data)
                    yield parse(stream.read(file.size), f"{path}, {file.name}")
