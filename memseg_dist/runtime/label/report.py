"""What came of a label run, read back from what it wrote."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memseg_dist.data.decode import decode_json
from memseg_dist.evaluation.fusion import FusionCounts
from memseg_dist.evaluation.pseudo import PseudoScores
from memseg_dist.runtime.build import BuildReport
from memseg_dist.runtime.label.task import NOTE


@dataclass(frozen=True)
class LabelReport:
    """What came of it. num_missing of the num_maps maps were never written by the run.

    left_out: uid -> images with a label that the run did not train. counts: pixels, over all
    images. build: sizes, resumed shards and images that could not be read.
    """

    build: BuildReport
    num_images: int
    num_without_labels: int
    num_maps: int
    num_missing: int
    counts: FusionCounts
    left_out: Mapping[str, int] = field(default_factory=dict)
    scores: PseudoScores | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.build.root}: {self.num_images:,} images labelled, "
            f"{self.num_without_labels:,} of them without labels; "
            f"{len(self.build.skipped):,} could not be read",
            f"  maps: {self.num_maps:,}, of which {self.num_missing:,} were never written and "
            f"{self.counts.no_evidence:,} show nothing (the former among them)",
            f"  unknown: {100 * self.counts.share_unknown:.2f} % of the pixels",
        ]
        for rule, pixels in self.counts.by_rule().items():
            lines.append(f"    {rule:<16} {100 * pixels / max(self.counts.pixels, 1):6.2f} %")
        if self.left_out:
            listing = ", ".join(f"{uid} ({count})" for uid, count in [*self.left_out.items()][:8])
            lines.append(f"  left out, since the run did not train them (images): {listing}")
        return "\n".join([*lines, *([str(self.scores)] if self.scores else [])])

    def metrics(self, prefix: str = "label/") -> dict[str, float]:
        """What a tracker plots."""
        pixels = max(self.counts.pixels, 1)
        figures = {
            "images": float(self.num_images),
            "images_without_labels": float(self.num_without_labels),
            "maps_missing_percent": 100 * self.num_missing / max(self.num_maps, 1),
            "unknown_percent": 100 * self.counts.share_unknown,
        }
        for rule, count in self.counts.by_rule().items():
            figures[f"unknown_percent_{rule}"] = 100 * count / pixels
        scores = self.scores.metrics(f"{prefix}truth_") if self.scores else {}
        return {f"{prefix}{name}": value for name, value in figures.items()} | scores


def read_report(
    built: BuildReport, left_out: Mapping[str, int], scores: PseudoScores | None
) -> LabelReport:
    """The report of what `built` wrote, this time and before."""
    counts, num_maps, num_missing, num_without = FusionCounts(), 0, 0, 0
    for note in _notes(built.root):
        num_maps += note.pop("maps")
        num_missing += note.pop("maps_missing")
        num_without += note["without_classes"] > 0
        counts = counts.plus(FusionCounts(**note))
    return LabelReport(
        built, built.num_samples, num_without, num_maps, num_missing, counts, left_out, scores
    )


def _notes(root: Path) -> Iterator[dict[str, Any]]:
    """What each written sample's JSON tells of its label map."""
    for path in sorted(root.glob("shard-*.tar")):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield decode_json(content.read())[NOTE]
