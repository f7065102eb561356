"""What a memory holds, as one string that is the same at any number of workers."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import torch

from memseg_dist import dist
from memseg_dist.memory.rows import ShardedRows


def digest_of(bank: ShardedRows, *, values: bool = False) -> str:
    """SHA-256 of which event each row took last and how many, equal at any number of workers.

    values=True adds the rows' bytes, which are equal where the arithmetic is: on CPU with as
    many threads per worker. Collective.
    """
    rows = [bank.rows.flatten(1)] if values else []
    parts = [bank.updates[:, None], bank.origin, *rows]
    host = [part.contiguous().cpu().view(torch.uint8).numpy() for part in parts]
    starts = bank.layout.starts[bank.owned.start : bank.owned.stop + 1] - bank.start
    local = [
        hashlib.sha256(b"".join(part[low:high].tobytes() for part in host)).digest()
        for low, high in pairwise(starts)
    ]
    ranks = [local] if bank.table == "local" else dist.all_gather_object(local)
    total = hashlib.sha256(b"".join(key.tobytes() for key in bank.layout.keys.values()))
    for digests in ranks:
        total.update(b"".join(digests))
    return total.hexdigest()
