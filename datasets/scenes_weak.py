"""The scenes of scenes.py for methods that learn from image labels alone, as on PASCAL VOC.

    python datasets/scenes_weak.py --root data/scenes_weak                 # 25 classes, 96 px
    python datasets/scenes_weak.py --root data/scenes_weak --saliency --preview weak.png

The same pictures as scenes.py draws for its splits `weak` and `val`, with another truth: all stuff
is "background", the objects keep their uids.
    train           scenes with masks, which are for scoring pseudo labels only: a run takes this
                    split with supervision="labels", hide_mask=True (else a mask may choose the
                    crop) and exclude=("background",)
    val             scenes with masks
    saliency/*.png  with --saliency, a map per picture of train, for Source(saliency=...)

An object of which less than 0.4% of the picture is seen is no label and its pixels are unknown.
Every scene is drawn around an object; a picture in which none is seen is kept, without a label, and
counted.

The saliency maps are made FROM THE TRUTH and stand in for a saliency model: the objects' area,
blurred, with some objects missed, some patches of background taken for objects, uneven strength and
noise. What is gained from them on the scenes says nothing of a real saliency model.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from rich.progress import track

from memseg_dist.batch import derive_seed
from memseg_dist.data.files import make_folder, write_atomically
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.shards import Sample, finish, write_shard
from memseg_dist.tools.shipped import recipe

scenes: Any = recipe("scenes")

SPLITS = {"train": "weak", "val": "val"}
"""Our split -> the split of scenes.py whose pictures it has."""
BACKGROUND = Category("background", "background")
MISSED = 0.15  # chance that a salient object is not found
MISTAKEN = 0.25  # chance of a patch of background that is


@dataclass(frozen=True)
class ScenesWeak:
    """What to draw, and where to."""

    root: Path
    """Directory that receives one shard directory per split."""
    size: int = 96
    """Side of the square pictures in pixels."""
    num_objects: int = 24
    """Object classes."""
    train: int = 1500
    """Pictures to train on."""
    val: int = 300
    """Pictures to score on."""
    cooccurrence: float = 0.6
    """Chance that an object lies on its home stuff, and that its partner is there too."""
    seed: int = 0
    """Other pictures for another seed."""
    saliency: bool = False
    """Also write ROOT/saliency, synthetic maps of the train split's pictures."""
    samples_per_shard: int = 250
    """Pictures in one tar."""
    processes: int = 2
    """Worker processes; 0 draws in this one."""
    preview: Path | None = None
    """Also write a contact sheet (PNG) to this file."""

    def __post_init__(self) -> None:
        if self.train < 1:
            raise ValueError(f"--train {self.train}: give >= 1")
        _ = self.scenes  # which checks the rest

    @property
    def scenes(self) -> Any:
        """The settings of scenes.py, for its `draw`."""
        names = ("root", "size", "num_objects", "val", "cooccurrence", "seed", "samples_per_shard")
        return scenes.Scenes(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Picture:
    """image uint8 [H, W, 3]; truth uint16 [H, W] of classes, 0 = background, 65535 = unknown."""

    key: str
    image: NDArray[np.uint8]
    truth: NDArray[np.uint16]
    labels: tuple[int, ...]


def vocabulary(num_objects: int) -> Vocabulary:
    """Background, then the objects with the uids and names that scenes.py gives them."""
    return Vocabulary((BACKGROUND, *scenes.vocabulary("objects", num_objects).categories))


def draw(config: ScenesWeak, split: str, index: int) -> Picture:
    """Picture `index` of `split`, a pure function of the settings but for their counts."""
    drawn = scenes.draw(config.scenes, SPLITS[split], index)
    num_stuff = len(scenes.STUFF)
    labels = tuple(label - num_stuff + 1 for label in drawn.labels if label >= num_stuff)
    truth = np.maximum(drawn.truth - num_stuff + 1, 0)
    truth = np.where(np.isin(truth, (0, *labels)), truth, scenes.UNKNOWN).astype(np.uint16)
    return Picture(f"{split}{index:08d}", drawn.image, truth, labels)


def draw_saliency(config: ScenesWeak, index: int, truth: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """[H, W], 255 = salient: what a saliency model might say of picture `index` of train."""
    rng = np.random.default_rng(derive_seed(config.seed, "scenes saliency", index))
    size = config.size
    strength = np.zeros((size, size), np.float32)
    for label in np.unique(truth[truth > 0]):
        found = rng.random() >= MISSED
        strength[truth == label] = rng.uniform(0.7, 1.0) if found else rng.uniform(0.0, 0.15)
    if rng.random() < MISTAKEN:
        centre, radius = rng.uniform(0, size, 2), rng.uniform(0.08, 0.16) * size
        y, x = np.mgrid[:size, :size]
        patch = np.hypot(y - centre[0], x - centre[1]) < radius
        strength[patch] = np.maximum(strength[patch], rng.uniform(0.4, 0.8))
    blur = ImageFilter.GaussianBlur(size / 96 * rng.uniform(1.0, 2.5))
    bumps = Image.fromarray(rng.random((7, 7), dtype=np.float32)).resize((size, size))
    uneven = 0.75 + 0.5 * np.asarray(bumps)
    noise = rng.normal(0, 0.03, (size, size))
    blurred = np.asarray(Image.fromarray((strength * 255).astype(np.uint8)).filter(blur)) / 255
    return (np.clip(blurred * uneven + noise, 0, 1) * 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------- shards


def build(config: ScenesWeak) -> None:
    """Draw and write both splits (and the maps); what is whole already is kept.

    ValueError if `root` holds scenes of other settings or cannot be written to.
    """
    scenes.claim(config, free=("root", "processes", "preview", "saliency"))
    pending = [name for name in SPLITS if not (config.root / name / "index.parquet").exists()]
    tasks = [
        (config, write, name, start)
        for write, names in ((_write_shard, pending), (_write_maps, ["train"] * config.saliency))
        for name in names
        for start in range(0, getattr(config, name), config.samples_per_shard)
    ]
    with contextlib.ExitStack() as stack:
        mapping: Callable[..., Iterator[None]] = map
        if config.processes and tasks:
            mapping = stack.enter_context(ProcessPoolExecutor(config.processes)).map
        for _ in track(mapping(_run, tasks), "scenes: shards", len(tasks), transient=True):
            pass
    for name in SPLITS:
        if name in pending:
            finish(config.root / name, vocabulary(config.num_objects))
        index = Index.open(config.root / name)
        bare = sum(set(index.labels(row)) <= {0} for row in range(len(index)))
        state = "written" if name in pending else "there already"
        print(f"{config.root / name}: {len(index):,} pictures {state}, {bare} without an object")
    if config.preview is not None:
        preview(config, config.preview)
        print(f"preview: {config.preview}")


def _run(task: tuple[ScenesWeak, Callable[[ScenesWeak, str, range], None], str, int]) -> None:
    config, write, name, start = task
    write(config, name, range(start, min(start + config.samples_per_shard, getattr(config, name))))


def _write_shard(config: ScenesWeak, name: str, indices: range) -> None:
    number = indices.start // config.samples_per_shard
    num_classes = 1 + config.num_objects
    write_shard(config.root / name, number, samples(config, name, indices), num_classes=num_classes)


def samples(config: ScenesWeak, name: str, indices: range) -> Iterator[Sample]:
    for index in indices:
        picture = draw(config, name, index)
        content = io.BytesIO()
        Image.fromarray(picture.image).save(content, "JPEG", **scenes.JPEG)
        yield Sample(picture.key, content.getvalue(), "jpg", picture.labels, picture.truth)


def _write_maps(config: ScenesWeak, name: str, indices: range) -> None:
    for index in indices:
        picture = draw(config, name, index)
        content = io.BytesIO()
        Image.fromarray(draw_saliency(config, index, picture.truth)).save(content, "PNG")
        write_atomically(config.root / "saliency" / f"{picture.key}.png", content.getvalue())


def preview(config: ScenesWeak, path: Path, columns: int = 10) -> None:
    """A contact sheet (PNG) of train: pictures, below them their classes and their saliency."""
    palette = np.random.default_rng(3).integers(60, 256, (scenes.UNKNOWN + 1, 3), dtype=np.uint8)
    palette[[0, scenes.UNKNOWN]] = [(0, 0, 0), (255, 255, 255)]
    rows = []
    for first in range(0, 3 * columns, columns):
        drawn = [draw(config, "train", first + i) for i in range(columns)]
        maps = [draw_saliency(config, first + i, item.truth) for i, item in enumerate(drawn)]
        rows.append(np.hstack([item.image for item in drawn]))
        rows.append(np.hstack([palette[item.truth] for item in drawn]))
        rows.append(np.hstack([np.repeat(grey[..., None], 3, axis=2) for grey in maps]))
    make_folder(path.parent)
    Image.fromarray(np.vstack(rows)).save(path)


if __name__ == "__main__":
    try:
        build(tyro.cli(ScenesWeak))
    except ValueError as error:
        sys.exit(f"error: {error}")
