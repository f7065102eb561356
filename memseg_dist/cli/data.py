"""`memseg data index` and `memseg data verify`."""

from __future__ import annotations

from tyro.conf import Positional

from memseg_dist.data.index import Index
from memseg_dist.tools import verify as verifier
from memseg_dist.tools.external import ensure_indexed, unindexed


def verify(root: Positional[str]) -> None:
    """Decode every member of a data set's shards and check it against the index.

    Args:
        root: Folder or URL with index.parquet and vocabulary.json.
    """
    ensure_indexed([root])
    print(f"{root}: {verifier.verify(root)}")


def index(root: Positional[str]) -> None:
    """Index WebDataset shards that others made: KEY.jpg|png|webp with KEY.cls or KEY.json.

    Args:
        root: Folder or URL with *.tar, and a vocabulary.json if there are labels; the index goes
            into it if it can be written to.
    """
    ensure_indexed([root])
    opened = Index.open(root)
    opened.check_shards()
    if missing := unindexed(opened):
        raise ValueError(
            f"{len(missing)} shards are not in {opened.parquet}, such as {missing[0]}; delete the "
            "index to have all shards indexed anew, or move these to another folder"
        )
    print(f"{root}: {opened}")
