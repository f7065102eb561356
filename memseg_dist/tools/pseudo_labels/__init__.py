"""The label stage: shards in, the same shards with pseudo labels out, by any labeller.

    report = label(LabelConfig("runs/rca", "data/voc/train", "data/voc/pseudo"))

Any segmentation run trains on the result as on any other shards. A stopped run is repeated by the
same command. Each sample's JSON holds the labeller's note, so nothing of the report is lost with
the process that printed it.
"""

from memseg_dist.tools.pseudo_labels.report import LabelReport
from memseg_dist.tools.pseudo_labels.run import label

__all__ = ["LabelReport", "label"]
