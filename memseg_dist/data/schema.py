"""The on-disk names and columns of a data set split. `docs/architecture.md` shows the format.

ROOT/index.parquet, ROOT/vocabulary.json, ROOT/shard-000000.tar ... with members KEY.jpg|png|webp,
KEY.mask.png (16-bit grey, local class id, 65535 = unknown) and KEY.json ({"labels": [...], ...}).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

INDEX_NAME = "index.parquet"
VOCABULARY_NAME = "vocabulary.json"
PART_SUFFIX = ".index.parquet"
FORMATS = ("jpg", "png", "webp")
MAX_MEMBER_BYTES = 512 << 20
"""No image or mask has more: what an index or a shard claims is bounded before it is read."""


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def part_name(number: int) -> str:
    return f"shard-{number:06d}{PART_SUFFIX}"


def arrow_schema() -> pyarrow.Schema:
    """The columns of `index.parquet`.

    shard: path relative to the index, or a whole path or URL. Offsets and sizes are of the members'
    contents in the tar; mask_size 0 = no mask.
    labels: ascending local ids; pixels: how many pixels each of them has, [] without a mask.
    """
    import pyarrow as pa

    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            ("image_offset", pa.int64()),
            ("image_size", pa.int64()),
            ("image_format", pa.string()),
            ("mask_offset", pa.int64()),
            ("mask_size", pa.int64()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("labels", pa.list_(pa.int32())),
            ("pixels", pa.list_(pa.int64())),
        ]
    )
