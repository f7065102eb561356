"""Pseudo labels: shards with image labels in, the same shards with masks out.

    report = label(LabelConfig("runs/rca", "data/voc/train", Path("data/voc/pseudo")))

Any segmentation run trains on the result as on any other shards. A stopped run is repeated by the
same command. Each sample's JSON tells which rule made how many of its pixels unknown, so nothing of
the report is lost with the process that printed it.
"""

from memseg_dist.runtime.label.report import LabelReport
from memseg_dist.runtime.label.run import LabelConfig, label

__all__ = ["LabelConfig", "LabelReport", "label"]
