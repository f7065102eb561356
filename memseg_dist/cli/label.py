"""`memseg label`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from memseg_dist.runtime.label import LabelConfig
from memseg_dist.runtime.label import label as run_label


def label(config: Annotated[LabelConfig, arg(name="")]) -> None:
    """Write pseudo labels: shards with image labels in, the same shards with masks out."""
    report = run_label(config)
    print(f"{report}\npictures are in {config.out}/panels")
