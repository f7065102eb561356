"""`memseg data split`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from memseg_dist.data.files import absolute
from memseg_dist.data.index import Index
from memseg_dist.data.splits import split_name
from memseg_dist.tools.external import ensure_indexed
from memseg_dist.tools.splits import (
    PROTOCOLS,
    Pool,
    Rule,
    draw,
    listed_keys,
    number_of,
    open_pool,
    write_splits,
)

_RAREST = 3


def split(
    root: Positional[str],
    sizes: Positional[tuple[str, ...]] = (),
    *,
    rule: Rule | None = None,
    seeds: tuple[int, ...] | None = None,
    protocol: Literal["voc", "voc-aug", "coco", "cityscapes"] | None = None,
    keys: str | None = None,
    suffixes: tuple[str, ...] = ("_leftImg8bit",),
    within: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Make splits of a data set: ROOT/splits/NAME.txt, which `Source.split` takes by name.

    Sizes are numbers of images or shares of them, rounded up: 92 1/16. A split is named after its
    size and seed, as 1_16-seed0. Where some images have masks, only those are drawn.

    Args:
        root: Folder with shards.
        sizes: How many images: 92, or a share: 1/16.
        rule: nested (the default): a smaller split lies in a larger one of the same seed;
            every-class: independent draws, each repeated until every class occurs.
        seeds: One split of each size for each of these; 0 by default.
        protocol: The published numbers, with the rule and seeds of the paper: voc (PseudoSeg: 1,464
            images; --within train where the shards are train_aug), voc-aug and cityscapes
            (Three-stage; 10,582 and 2,975 images), coco (PseudoSeg; 118,287 images). The images
            are drawn here; official lists, where you have them, go in by --keys.
        keys: A list of keys or file names, one a line, as official lists are; folders, extension
            and --suffixes are left out where the keys are without them. With sizes: its first ones.
        suffixes: Endings of file names in --keys that are no part of the keys.
        within: Draw from the images of this split, not from all.
        name: Name of the split; by default that of its size and seed, or of the list.
        overwrite: Replace splits that are there with other keys.
    """
    root = absolute(root)
    ensure_indexed([root])
    index = Index.open(root)
    pool = open_pool(index, within)
    if keys is not None:
        _refuse("--keys", rule=rule, seeds=seeds, protocol=protocol, within=within)
        made = _of_list(listed_keys(keys, index, suffixes), sizes, split_name(keys))
    elif protocol is not None:
        _refuse("--protocol", sizes=sizes or None, rule=rule)
        made = _of_protocol(pool, protocol, seeds)
    elif sizes:
        numbers = {size: number_of(size, len(pool.keys)) for size in sizes}
        made = _drawn(pool, numbers, rule or "nested", seeds or (0,))
    else:
        raise ValueError(f"{root}: give sizes of the splits (92 or 1/16), --protocol or --keys")
    if name is not None:
        if len(made) != 1:
            raise ValueError(f"--name {name} is one name for {len(made)} splits: {[*made]}")
        made = {name: next(iter(made.values()))}
    write_splits(root, made, overwrite)
    Console().print(_table(pool, made))
    print(f"{len(made)} splits are in {root}/splits")


def _refuse(flag: str, **others: object) -> None:
    """ValueError for a flag that has no meaning beside `flag`."""
    given = [f"--{name}" for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f"{flag} goes without {', '.join(given)}")


def _of_list(keys: list[str], sizes: Sequence[str], name: str) -> dict[str, list[str]]:
    if not sizes:
        return {name: keys}
    return {f"{_word(size)}-{name}": keys[: number_of(size, len(keys))] for size in sizes}


def _of_protocol(pool: Pool, name: str, seeds: tuple[int, ...] | None) -> dict[str, list[str]]:
    protocol = PROTOCOLS[name]
    if len(pool.keys) != protocol.num_images:
        within = ", or name the split with its images by --within" if name == "voc" else ""
        raise ValueError(
            f"--protocol {name} is of {protocol.num_images:,} images, but here are "
            f"{len(pool.keys):,}; write the whole data set{within}, or give sizes of your own"
        )
    return _drawn(pool, protocol.counts, protocol.rule, seeds or protocol.seeds)


def _drawn(
    pool: Pool, numbers: Mapping[str, int], rule: Rule, seeds: Sequence[int]
) -> dict[str, list[str]]:
    return {
        f"{_word(size)}-seed{seed}": draw(pool, number, rule, seed)
        for size, number in numbers.items()
        for seed in seeds
    }


def _word(size: str) -> str:
    return size.replace("/", "_")


def _table(pool: Pool, splits: Mapping[str, Sequence[str]]) -> Table:
    """What each split shows, the rarest of the set's classes first."""
    image_of = {key: image for image, key in enumerate(pool.keys)}  # a list may name others too
    known = np.flatnonzero(pool.counts(np.arange(len(pool.keys))))
    table = Table("split", "images", "classes shown", "rarest (images)")
    for name, keys in splits.items():
        images = np.array([image_of[key] for key in keys if key in image_of], dtype=np.int64)
        counts = pool.counts(images)[known]
        rarest = np.argsort(counts, kind="stable")[:_RAREST]
        listed = ", ".join(f"{pool.class_names[known[at]]} ({counts[at]})" for at in rarest)
        shown = f"{(counts > 0).sum()} of {len(known)}"
        table.add_row(name, f"{len(keys):,}", shown, listed)
    return table
