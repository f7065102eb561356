"""`memseg bank inspect` and `memseg bank search`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from memseg_dist.cli.model import (
    InferenceOptions,
    Model,
    ModelFlags,
    chosen_classes,
    open_model,
)
from memseg_dist.data.files import make_folder
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.tools.predict import read_image
from memseg_dist.tools.search import PublishedRows


def inspect(
    model: ModelFlags,
    out: Path | None = None,
    classes: str | None = None,
    show: int = 20,
) -> None:
    """Show what the memory holds, the coldest classes first.

    Args:
        out: Folder to publish the bank to, as Parquet (uid, position, vector, count, last_step).
        classes: Only these, comma-separated: names, synonyms or uids.
        show: At most so many classes.
    """
    opened = open_model(model, with_memories=True)
    bank, vocabulary = _bank(opened), opened.label_space.vocabulary
    chosen = chosen_classes(vocabulary, classes, "--classes")
    per_class = bank.per_class()
    num_scopes = len(per_class.rows) // len(vocabulary)
    rows, events, last = (part.reshape(num_scopes, -1) for part in per_class)
    rows, events, last = rows.sum(axis=0), events.sum(axis=0), last.max(axis=0)
    figures = bank.summary(opened.step)
    print(
        f"step {opened.step}: {rows.sum():,} rows of {bank.shape[0]} channels in {len(vocabulary)} "
        f"classes; fill {figures['fill']:.1%}, coverage {figures['coverage']:.1%}, "
        f"staleness {figures['staleness']:.1f} steps"
    )
    table = Table("uid", "name", "rows", "events", "last step")
    for index in sorted(chosen, key=lambda index: (rows[index], last[index], index))[:show]:
        when = str(last[index]) if last[index] >= 0 else "never"
        name = vocabulary.names[index]
        table.add_row(vocabulary.uids[index], name, str(rows[index]), str(events[index]), when)
    Console().print(table)
    if len(chosen) > show:
        print(f"{len(chosen) - show} more; raise --show to see them")
    if out is not None:
        bank.publish(make_folder(out), list(vocabulary.uids) * num_scopes)
        print(f"published to {out}")


def search(
    model: ModelFlags,
    like: str | None = None,
    image: str | None = None,
    at: tuple[int, int] | None = None,
    resize: tuple[int, int] | None = None,
    bank: Path | None = None,
    rows: bool = False,
    neighbours: int = 10,
) -> None:
    """Find the classes (or single rows) of the memory that are nearest by cosine.

    Args:
        like: A class, by name, synonym or uid: what is near the mean of its rows?
        image: A picture: what is near its pixel --at?
        at: Column and row of the pixel in --image.
        resize: Longest and shortest side that --image is fitted to; as in the run's validation.
        bank: A published bank to search; by default that of the checkpoint.
        rows: Search single rows, not the classes' means.
        neighbours: How many to show.
    """
    if (like is None) == (image is None):
        raise ValueError("give one of --like CLASS and --image IMAGE --at COLUMN ROW")
    if (image is None) != (at is None):
        raise ValueError("--image and --at go together: --image IMAGE --at COLUMN ROW")
    opened = open_model(model, with_memories=bank is None)
    vocabulary = opened.label_space.vocabulary
    with tempfile.TemporaryDirectory() as scratch:
        if bank is None:
            held = _bank(opened)
            repeats = len(held.per_class().rows) // len(vocabulary)
            held.publish(scratch, list(vocabulary.uids) * repeats)
        published = PublishedRows.open(bank or scratch)
    means = published.class_means()
    if like is not None:
        query = means.of_class(vocabulary.uids[chosen_classes(vocabulary, like, "--like")[0]])
    else:
        assert image is not None and at is not None
        query = _pixel_embedding(opened, image, at, InferenceOptions(resize=resize))
    found = (published if rows else means).nearest(query, neighbours)[0]
    table = Table("cosine", "uid", "name", *(["position"] if rows else []))
    for item in found:
        known = item.uid in vocabulary
        name = vocabulary.names[vocabulary.index(item.uid)] if known else "?"
        position = [str(item.position)] if rows else []
        table.add_row(f"{item.cosine:.4f}", item.uid, name, *position)
    Console().print(table)


def _bank(model: Model) -> ShardedRows:
    for memory in model.method.state().values():
        if isinstance(memory, ShardedRows) and len(memory.shape) == 1:
            return memory
    raise ValueError("the method of this checkpoint has no memory bank (a baseline run?)")


def _pixel_embedding(
    model: Model, image: str, at: tuple[int, int], options: InferenceOptions
) -> np.ndarray:
    """[1, D]: the embedding of the position that holds the pixel (column, row)."""
    pixels = read_image(image)
    height, width = pixels.shape[-2:]
    column, row = at
    if not (0 <= column < width and 0 <= row < height):
        raise ValueError(f"--at {column} {row}: {image} has {width} x {height} pixels")
    small = options.resolved(model).fitted(pixels).to(model.device)
    model.method.eval()
    with torch.no_grad():
        features = model.method.embed(small[None])[0]
    y = int((row + 0.5) / height * small.shape[-2]) // model.method.stride
    x = int((column + 0.5) / width * small.shape[-1]) // model.method.stride
    return features[:, y, x][None].float().cpu().numpy()
