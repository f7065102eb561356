"""The kinds of files and command lines that come from outside, and the forms of each.

A damaged file is read right if what is still whole in it is read as it was. So nothing is asked of
a sample whose bytes are hit where no checksum guards them (JPEG, WebP, text), but that of its size.
"""

from __future__ import annotations

from fuzz.kind import Kind
from fuzz.lists import ClassList, IndexJson, SplitList, Table, VocabularyFile
from fuzz.runs import Bank, CheckpointFiles, Commands, Config, JobFlags
from fuzz.shards import (
    IndexPart,
    IndexRows,
    LabelMap,
    Labels,
    Mask,
    OthersShard,
    OwnShard,
    Picture,
)

KINDS: dict[str, tuple[type[Kind], ...]] = {
    "tar": (OthersShard, OwnShard),
    "image": (Picture,),
    "mask": (Mask, LabelMap),
    "json": (Labels,),
    "parquet": (IndexRows, IndexPart, Bank),
    "vocabulary": (VocabularyFile, ClassList),
    "table": (Table, IndexJson, SplitList),
    "config": (Config,),
    "manifest": (CheckpointFiles,),
    "command": (Commands, JobFlags),
}
