"""Scenes: a generated benchmark for mixed supervision, drawn in seconds, without a download.

    python datasets/scenes.py --root data/scenes                       # 32 classes, 96 px
    python datasets/scenes.py --root data/scenes --preview scenes.png  # and a sheet to look at

Objects are told apart by shape and texture and stuff by texture; every instance draws its own
colours, so colour says nothing. Pictures hold occlusion, scale, clutter (scraps of no class),
illumination and co-occurrence: an object tends to lie on its home stuff and beside its partner.

Four splits, each a shard directory with the vocabulary that it labels:
    masks    scenes, pixel masks of the base classes; pixels of novel objects are "ignore"
    weak     scenes, image labels (all classes that can be seen), no mask
    objects  one large object, one image label (object classes only), like ImageNet
    val      scenes, pixel masks of every class

Picture `i` of a split is a pure function of (seed, split, i, size, num_objects): the number of
processes, of shards and of pictures changes nothing in it. About 2 ms a picture and core at 96 px.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from memseg_dist.batch import derive_seed
from memseg_dist.data.files import make_folder, write_atomically
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.shards import Sample, finish, write_shard

Field = NDArray[np.float32]

SPLITS = ("masks", "weak", "objects", "val")
UNKNOWN = 65535
"""Value of a mask's pixel whose class the split does not label."""
SETTINGS = "scenes.json"
JPEG = {"quality": 92, "subsampling": 0}

STUFF = ("grain", "clouds", "camouflage", "waves", "bricks", "haze", "grass", "water")
SHAPES = (
    "disc",
    "square",
    "triangle",
    "cross",
    "star",
    "ring",
    "heart",
    "crescent",
    "arrow",
    "bar",
    "bowtie",
    "corner",
)
TEXTURES = (
    "weave",
    "rungs",
    "stakes",
    "diagonals",
    "checks",
    "dots",
    "grid",
    "target",
    "zigzag",
    "rays",
    "scales",
    "pluses",
)


@dataclass(frozen=True)
class Scenes:
    """What to draw, and where to."""

    root: Path
    """Directory that receives one shard directory per split."""
    size: int = 96
    """Side of the square pictures in pixels."""
    num_objects: int = 24
    """Object classes; any number (above 144 the shapes and textures are procedural)."""
    masks: int = 2400
    """Pictures with masks."""
    weak: int = 3000
    """Pictures with image labels alone."""
    objects: int = 3600
    """Pictures of single objects, to pre-train on."""
    val: int = 300
    """Pictures to score on."""
    cooccurrence: float = 0.6
    """Chance that an object lies on its home stuff, and that its partner is there too."""
    seed: int = 0
    """Other pictures for another seed."""
    samples_per_shard: int = 250
    """Pictures in one tar."""
    processes: int = 2
    """Worker processes; 0 draws in this one."""
    preview: Path | None = None
    """Also write a contact sheet (PNG) of every split to this file."""

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ValueError(f"--size {self.size}: objects need pictures of 32 pixels or more")
        if self.num_objects < 3:
            raise ValueError(f"--num-objects {self.num_objects}: every third is novel; give >= 3")
        if not 0 <= self.cooccurrence <= 1:
            raise ValueError(f"--cooccurrence {self.cooccurrence}: a chance lies in 0..1")
        for name in (*SPLITS, "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give >= 1")


@dataclass(frozen=True)
class Picture:
    """image uint8 [H, W, 3]; truth int32 [H, W] of class ids (stuff first, then objects)."""

    image: NDArray[np.uint8]
    truth: NDArray[np.int32]
    labels: tuple[int, ...]


# ------------------------------------------------------------------------------------ class list


def shape_and_texture(index: int) -> tuple[int, int]:
    """Object class `index` -> (shape, texture); injective, and the same for any `num_objects`."""
    group, within = divmod(index, len(SHAPES) * len(TEXTURES))
    row, shape = divmod(within, len(SHAPES))
    texture = (shape + 5 * row) % len(TEXTURES)
    return group * len(SHAPES) + shape, group * len(TEXTURES) + texture


def class_uids(num_objects: int) -> list[str]:
    """Stable uids of all classes: the stuff, then the objects."""
    uids = [f"scenes:stuff-{name}" for name in STUFF]
    for index in range(num_objects):
        shape, texture = shape_and_texture(index)
        uids.append(f"scenes:{_name(SHAPES, shape)}-{_name(TEXTURES, texture)}")
    return uids


def is_novel(index: int) -> bool:
    """Whether object class `index` is never given a mask: one in three."""
    return index % 3 == 2


def base_and_novel(num_objects: int) -> tuple[list[str], list[str]]:
    """Uids with masks (all stuff, two objects of three) and uids with image labels alone."""
    uids = class_uids(num_objects)
    novel = [uids[len(STUFF) + index] for index in range(num_objects) if is_novel(index)]
    return [uid for uid in uids if uid not in set(novel)], novel


def split_classes(split: str, num_objects: int) -> list[int]:
    """Class ids that a split's vocabulary holds, ascending; their position is the local id."""
    everything = list(range(len(STUFF) + num_objects))
    if split == "objects":
        return everything[len(STUFF) :]
    if split == "masks":
        return [i for i in everything if i < len(STUFF) or not is_novel(i - len(STUFF))]
    return everything


def _name(names: tuple[str, ...], index: int) -> str:
    turn, which = divmod(index, len(names))
    return names[which] if turn == 0 else f"{names[which]}{turn + 1}"


# -------------------------------------------------------------------------------- shapes, textures


def _polygon(x: Field, y: Field, sides: int, inner: float, turn: float) -> NDArray[np.bool_]:
    """Inside of a star with `sides` points; inner radius `inner` (1 gives nearly a disc)."""
    radius, angle = np.hypot(x, y), np.arctan2(x, -y) + turn
    wave = np.abs((angle * sides / (2 * np.pi)) % 1 * 2 - 1)  # 1 at the points
    return radius < inner + (1 - inner) * wave


_INSIDE: dict[str, Callable[[Field, Field], NDArray[np.bool_]]] = {
    "disc": lambda x, y: x * x + y * y < 0.78,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.78,
    "triangle": lambda x, y: (y < 0.7) & (abs(x) * 1.75 < y + 0.98),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.34) & (np.maximum(abs(x), abs(y)) < 0.95),
    "star": lambda x, y: _polygon(x, y, 5, 0.42, 0.0),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.66) < 0.27,
    "heart": lambda x, y: (
        (1.35 * x) ** 2 + (-1.25 * y + 0.15 - 0.75 * np.sqrt(abs(1.35 * x))) ** 2 < 0.95
    ),
    "crescent": lambda x, y: (x * x + y * y < 0.92) & ((x - 0.5) ** 2 + y * y > 0.5),
    "arrow": lambda x, y: (
        ((y < 0.05) & (abs(x) < y + 0.95)) | ((abs(x) < 0.34) & (y > 0) & (y < 0.9))
    ),
    "bar": lambda x, y: (abs(x) < 1.0) & (abs(y) < 0.36),
    "bowtie": lambda x, y: (abs(x) < 0.95) & (abs(y) < 0.14 + 0.76 * abs(x)),
    "corner": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.85) & ((x < -0.2) | (y > 0.2)),
}


def inside_shape(shape: int, x: Field, y: Field) -> NDArray[np.bool_]:
    """Which points of the unit square (-1..1, y down) lie within shape number `shape`."""
    turn, which = divmod(shape, len(SHAPES))
    if turn == 0:
        return _INSIDE[SHAPES[which]](x, y)
    rng = np.random.default_rng(derive_seed("scenes shape", shape))
    sides, inner = int(rng.integers(3, 12)), float(rng.uniform(0.25, 0.8))
    lobes = _polygon(x, y, sides, inner, float(rng.uniform(0, 6.3)))
    hole = np.hypot(x - rng.uniform(-0.3, 0.3), y - rng.uniform(-0.3, 0.3)) < rng.uniform(0, 0.45)
    return lobes & ~hole


_PATTERN: dict[str, Callable[[Field, Field, Field, Field], Field | NDArray[np.bool_]]] = {
    # (u, v): position in texture periods; (x, y): position in the object's unit square
    "weave": lambda u, v, x, y: (
        np.where((u * 0.5 % 1 < 0.5) ^ (v * 0.5 % 1 < 0.5), u * 1.5 % 1, v * 1.5 % 1) < 0.5
    ),
    "rungs": lambda u, v, x, y: v % 1 < 0.5,
    "stakes": lambda u, v, x, y: u % 1 < 0.5,
    "diagonals": lambda u, v, x, y: (u + v) * 0.7071 % 1 < 0.5,
    "checks": lambda u, v, x, y: (u % 1 < 0.5) ^ (v % 1 < 0.5),
    "dots": lambda u, v, x, y: (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09,
    "grid": lambda u, v, x, y: (u % 1 < 0.25) | (v % 1 < 0.25),
    "target": lambda u, v, x, y: np.hypot(u, v) % 1 < 0.5,
    "zigzag": lambda u, v, x, y: (v + 0.7 * abs((0.6 * u) % 1 * 2 - 1)) % 1 < 0.5,
    "rays": lambda u, v, x, y: (np.arctan2(y, x) * 5 / np.pi) % 1 < 0.5,
    "scales": lambda u, v, x, y: (
        np.hypot((u + 0.5 * (np.floor(1.6 * v) % 2)) % 1 - 0.5, (1.6 * v % 1) * 0.62) % 0.62 < 0.4
    ),
    "pluses": lambda u, v, x, y: (
        (np.minimum(abs(u % 1 - 0.5), abs(v % 1 - 0.5)) < 0.11)
        & (np.maximum(abs(u % 1 - 0.5), abs(v % 1 - 0.5)) < 0.37)
    ),
}


def pattern(texture: int, u: Field, v: Field, x: Field, y: Field) -> Field:
    """Texture number `texture` as a mixing weight 0..1 of the instance's two colours."""
    turn, which = divmod(texture, len(TEXTURES))
    if turn == 0:
        return _PATTERN[TEXTURES[which]](u, v, x, y).astype(np.float32)
    rng = np.random.default_rng(derive_seed("scenes texture", texture))
    angle, second = rng.uniform(0, np.pi), rng.uniform(0.3, 2.8)
    first_wave = np.sin(2 * np.pi * rng.uniform(0.7, 1.6) * (u * np.cos(angle) + v * np.sin(angle)))
    angle += second
    other_wave = np.sin(2 * np.pi * rng.uniform(0.4, 1.6) * (u * np.cos(angle) + v * np.sin(angle)))
    mixed = first_wave + rng.uniform(0, 1) * other_wave
    return (mixed > rng.uniform(-0.5, 0.5)).astype(np.float32)


def _noise(rng: np.random.Generator, size: int, cell_x: float, cell_y: float) -> Field:
    """Smooth value noise 0..1 of about one bump per cell (pixels), [size, size]."""
    columns, rows = max(2, round(size / cell_x) + 1), max(2, round(size / cell_y) + 1)
    coarse = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
    return np.clip(
        np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32), 0, 1
    )


def stuff_pattern(stuff: int, rng: np.random.Generator, size: int) -> Field:
    """Stuff texture number `stuff` over a whole picture: mixing weight 0..1, [size, size]."""
    unit = size / 96 * rng.uniform(0.85, 1.2)
    y, x = np.mgrid[:size, :size].astype(np.float32) / np.float32(unit)
    name = STUFF[stuff]
    if name == "grain":
        return rng.random((size, size), dtype=np.float32)
    if name == "clouds":
        return _noise(rng, size, 13 * unit, 13 * unit)
    if name == "camouflage":
        return (_noise(rng, size, 6 * unit, 6 * unit) > 0.5).astype(np.float32)
    if name == "waves":
        lift = 3 * np.sin(x / 5 + rng.uniform(0, 6.3)) + rng.uniform(0, 30)
        return (0.5 + 0.5 * np.sin((y + lift) * 2 * np.pi / 11)).astype(np.float32)
    if name == "bricks":
        row = np.floor((y + rng.uniform(0, 9)) / 7)
        across = (x + 7 * (row % 2) + rng.uniform(0, 14)) % 14
        return (((y % 7) < 1.4) | (across < 1.4)).astype(np.float32)
    if name == "haze":
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (x * np.cos(angle) + y * np.sin(angle)) * unit / size
        return (ramp - ramp.min()).astype(np.float32)
    if name == "grass":
        return _noise(rng, size, 1.5 * unit, 14 * unit)
    return _noise(rng, size, 16 * unit, 2.0 * unit)  # water


# ---------------------------------------------------------------------------------------- drawing


class _Canvas:
    """One picture under construction: image float32 [H, W, 3] in 0..1 and truth [H, W]."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.image = np.zeros((size, size, 3), np.float32)
        self.truth = np.zeros((size, size), np.int32)

    def colours(self, contrast_low: float, contrast_high: float) -> NDArray[np.float32]:
        """Two colours, any hues, whose mean brightness differs by the given contrast: [2, 3]."""
        contrast = self.rng.uniform(contrast_low, contrast_high)
        middle = self.rng.uniform(contrast / 2, 1 - contrast / 2)
        brightness = np.array([middle - contrast / 2, middle + contrast / 2])
        tint = self.rng.uniform(-0.3, 0.3, (2, 3))
        tint -= tint.mean(axis=1, keepdims=True)
        pair = np.clip(brightness[:, None] + tint, 0, 1).astype(np.float32)
        return pair[:: 1 if self.rng.random() < 0.5 else -1]

    def lay_stuff(self, kinds: list[int]) -> None:
        """Cover the picture with one region per kind, cut by wavy lines."""
        y, x = np.mgrid[: self.size, : self.size].astype(np.float32) / self.size - 0.5
        for order, kind in enumerate(kinds):
            angle = self.rng.uniform(0, 2 * np.pi)
            across = x * np.cos(angle) + y * np.sin(angle)
            along = y * np.cos(angle) - x * np.sin(angle)
            bend = 0.06 * np.sin(along * self.rng.uniform(4, 14) + self.rng.uniform(0, 6.3))
            region = across + bend > self.rng.uniform(-0.22, 0.22) if order else across > -9
            first, second = self.colours(0.25, 0.5)
            weight = stuff_pattern(kind, self.rng, self.size)[..., None]
            self.image = np.where(
                region[..., None], first + (second - first) * weight, self.image
            ).astype(np.float32)
            self.truth[region] = kind

    def scatter_clutter(self, number: int) -> None:
        """Scraps of one colour that belong to no class: the stuff beneath keeps its label."""
        for _ in range(number):
            centre_y, centre_x = self.rng.integers(0, self.size, 2)
            half = self.rng.integers(1, max(2, self.size // 32) + 1, 2)
            top, left = max(0, centre_y - half[0]), max(0, centre_x - half[1])
            self.image[top : centre_y + half[0], left : centre_x + half[1]] = self.rng.random(3)

    def draw_object(self, index: int, centre: tuple[float, float], radius: float) -> None:
        """Paint one instance of object class `index` (its truth too); centre is (y, x)."""
        rng, reach = self.rng, radius * 1.45
        top, left = (max(0, int(c - reach)) for c in centre)
        bottom, right = (min(self.size, int(c + reach) + 2) for c in centre)
        if bottom <= top or right <= left:
            return
        fine_y = (np.arange(2 * top, 2 * bottom, dtype=np.float32) + 0.5) / 2 - centre[0]
        fine_x = (np.arange(2 * left, 2 * right, dtype=np.float32) + 0.5) / 2 - centre[1]
        y, x = fine_y[:, None], fine_x[None, :]
        angle = np.float32(rng.uniform(-0.25, 0.25))
        aspect = np.float32(rng.uniform(0.88, 1.14))
        mirror = np.float32(1 if rng.random() < 0.5 else -1)
        turned_x = (x * np.cos(angle) - y * np.sin(angle)) * mirror
        turned_y = x * np.sin(angle) + y * np.cos(angle)
        unit_x, unit_y = turned_x / (radius * aspect), turned_y / (radius / aspect)
        shape, texture = shape_and_texture(index)
        period = self.size / 96 * 9 * rng.uniform(0.85, 1.2) * (radius / (0.25 * self.size)) ** 0.5
        phase_x, phase_y = (0, 0) if _name(TEXTURES, texture) == "target" else rng.random(2)
        u, v = turned_x / period + np.float32(phase_x), turned_y / period + np.float32(phase_y)
        weight = _halve(pattern(texture, u, v, unit_x, unit_y))[..., None]
        cover = _halve(inside_shape(shape, unit_x, unit_y).astype(np.float32))
        first, second = self.colours(0.35, 0.65)
        slope = rng.uniform(-0.15, 0.15, 2)
        shade = 1 + slope[0] * _halve(unit_x + 0 * unit_y) + slope[1] * _halve(unit_y + 0 * unit_x)
        paint = (first + (second - first) * weight) * shade[..., None]
        window = (slice(top, bottom), slice(left, right))
        self.image[window] += cover[..., None] * (paint - self.image[window])
        self.truth[window][cover >= 0.5] = len(STUFF) + index

    def finish(self) -> NDArray[np.uint8]:
        """Light the picture (a slope of brightness, exposure, sensor noise): uint8 [H, W, 3]."""
        rng, size = self.rng, self.size
        ramp = np.linspace(-1, 1, size, dtype=np.float32)
        slope = rng.uniform(-0.25, 0.25, 2)
        light = np.exp(slope[0] * ramp[:, None] + slope[1] * ramp[None, :] + rng.uniform(-0.2, 0.2))
        noise = rng.standard_normal((size, size, 3), dtype=np.float32) * 0.02
        lit = self.image * light[..., None] + noise
        return (np.clip(lit, 0, 1) * 255).astype(np.uint8)


def _halve(fine: Field) -> Field:
    """Mean of 2 x 2 blocks: antialiasing."""
    height, width = fine.shape
    return fine.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))


def home_stuff(index: int) -> int:
    """The stuff that object class `index` tends to lie on."""
    return (index * 3 + index // len(STUFF)) % len(STUFF)


def partner(index: int, num_objects: int) -> int:
    """The object class that tends to be seen with `index`: a neighbour in its group of three."""
    group = index - index % 3
    return min(group + (index + 1) % 3, num_objects - 1)


def draw(config: Scenes, split: str, index: int) -> Picture:
    """Picture `index` of `split`."""
    rng = np.random.default_rng(derive_seed(config.seed, "scenes", split, index))
    canvas = _Canvas(rng, config.size)
    if split == "objects":
        label = _draw_portrait(canvas, config, index)
        return Picture(canvas.finish(), canvas.truth, (label,))
    _draw_scene(canvas, config)
    classes, pixels = np.unique(canvas.truth, return_counts=True)
    seen = classes[pixels >= max(4, 0.004 * config.size**2)]
    return Picture(canvas.finish(), canvas.truth, tuple(int(c) for c in seen))


def _draw_portrait(canvas: _Canvas, config: Scenes, index: int) -> int:
    """One large object near the centre on one stuff; classes take turns. Returns its label."""
    rng, size = canvas.rng, config.size
    which = index % config.num_objects
    home = rng.random() < config.cooccurrence
    canvas.lay_stuff([home_stuff(which) if home else int(rng.integers(len(STUFF)))])
    canvas.scatter_clutter(int(rng.integers(0, 5)))
    centre = tuple(size / 2 + rng.uniform(-0.12, 0.12, 2) * size)
    canvas.draw_object(which, centre, size * rng.uniform(0.24, 0.42))
    return len(STUFF) + which


def _draw_scene(canvas: _Canvas, config: Scenes) -> None:
    """One to three stuff regions and a few objects, each apt to bring home and partner."""
    rng, size = canvas.rng, config.size
    objects: list[int] = []
    wanted = int(rng.integers(1, 4))
    while len(objects) < wanted:
        objects.append(int(rng.integers(config.num_objects)))
        if rng.random() < config.cooccurrence:
            objects.append(partner(objects[-1], config.num_objects))
    kinds = [home_stuff(objects[0])] if rng.random() < config.cooccurrence else []
    while len(kinds) < 1 + rng.integers(0, 3):
        kinds.append(int(rng.integers(len(STUFF))))
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    canvas.lay_stuff(kinds)
    canvas.scatter_clutter(int(rng.integers(0, 7)))
    taken: list[tuple[float, float, float]] = []
    for which in objects:
        radius = size * rng.uniform(0.17, 0.30)
        centre = _place(canvas, home_stuff(which), radius, taken, config.cooccurrence)
        taken.append((*centre, radius))
        canvas.draw_object(which, centre, radius)


def _place(
    canvas: _Canvas,
    home: int,
    radius: float,
    taken: list[tuple[float, float, float]],
    cooccurrence: float,
) -> tuple[float, float]:
    """A centre (y, x): of eight tries the one that best keeps free of others and lies at home."""
    tries = canvas.rng.uniform(0.08, 0.92, (8, 2)) * canvas.size
    cost = np.zeros(8)
    for y, x, other in taken:
        gap = np.hypot(tries[:, 0] - y, tries[:, 1] - x) / (radius + other)
        cost += np.maximum(0, 0.85 - gap) * 4
    at_home = canvas.truth[tries[:, 0].astype(int), tries[:, 1].astype(int)] == home
    if canvas.rng.random() < cooccurrence:
        cost -= at_home
    y, x = tries[int(cost.argmin())]
    return float(y), float(x)


# ----------------------------------------------------------------------------------------- shards


def vocabulary(split: str, num_objects: int) -> Vocabulary:
    """The classes that `split` labels."""
    uids = class_uids(num_objects)
    return Vocabulary(
        tuple(
            Category(uids[i], uids[i].partition(":")[2].removeprefix("stuff-").replace("-", " "))
            for i in split_classes(split, num_objects)
        )
    )


def samples(config: Scenes, split: str, start: int, stop: int) -> Iterator[Sample]:
    """Pictures start .. stop - 1 of `split`, in the local ids of its vocabulary."""
    classes = split_classes(split, config.num_objects)
    local = np.full(len(STUFF) + config.num_objects, UNKNOWN, np.uint16)
    local[classes] = np.arange(len(classes))
    for index in range(start, stop):
        picture = draw(config, split, index)
        content = io.BytesIO()
        Image.fromarray(picture.image).save(content, "JPEG", **JPEG)
        labels = tuple(int(local[i]) for i in picture.labels if local[i] != UNKNOWN)
        mask = local[picture.truth] if split in ("masks", "val") else None
        if mask is not None:
            labels = ()  # those of the mask, every visible pixel counted
        yield Sample(f"{split}{index:08d}", content.getvalue(), "jpg", labels, mask)


def build(config: Scenes) -> None:
    """Draw and write all splits; what is whole already is kept, so a killed run goes on.

    ValueError if `root` holds scenes of other settings or cannot be written to.
    """
    claim(config)
    pending = [s for s in SPLITS if not (config.root / s / "index.parquet").exists()]
    tasks = [
        (config, split, number)
        for split in pending
        for number in range(-(-getattr(config, split) // config.samples_per_shard))
    ]
    with contextlib.ExitStack() as stack:
        mapping: Callable[..., Iterator[None]] = map
        if config.processes and tasks:
            mapping = stack.enter_context(ProcessPoolExecutor(config.processes)).map
        for _ in track(mapping(_write, tasks), "scenes: shards", len(tasks), transient=True):
            pass
    for split in SPLITS:
        if split in pending:
            finish(config.root / split, vocabulary(split, config.num_objects))
        state = "written" if split in pending else "there already"
        print(f"{config.root / split}: {getattr(config, split):,} pictures {state}")
    base, novel = base_and_novel(config.num_objects)
    print(f"classes: {len(base)} base (masks), {len(novel)} novel (image labels alone)")
    if config.preview is not None:
        preview(config, config.preview)
        print(f"preview: {config.preview}")


def _write(task: tuple[Scenes, str, int]) -> None:
    config, split, number = task
    start = number * config.samples_per_shard
    stop = min(start + config.samples_per_shard, getattr(config, split))
    num_classes = len(split_classes(split, config.num_objects))
    write_shard(
        config.root / split, number, samples(config, split, start, stop), num_classes=num_classes
    )


def claim(config: Any, free: Sequence[str] = ("root", "processes", "preview")) -> None:
    """Note in `config.root` what is drawn there; refuse to mix two settings but for the `free`."""
    drawn = {name: value for name, value in asdict(config).items() if name not in free}
    path = make_folder(config.root) / SETTINGS
    if not path.exists():
        write_atomically(path, json.dumps(drawn, indent=1).encode())
        return
    found = json.loads(path.read_text())
    other = {name: found.get(name) for name in drawn if found.get(name) != drawn[name]}
    if other:
        wanted = {name: drawn[name] for name in other}
        raise ValueError(
            f"{config.root} holds scenes drawn with {other}, now {wanted} is asked for: name "
            "another --root, or delete that folder"
        )


def preview(config: Scenes, path: Path, columns: int = 8) -> None:
    """A contact sheet (PNG): of each split two rows of pictures, below them their true classes."""
    palette = np.random.default_rng(3).integers(40, 256, (len(STUFF) + config.num_objects, 3))
    rows = []
    for split in SPLITS:
        for first in (0, columns):
            drawn = [draw(config, split, first + i) for i in range(columns)]
            rows.append(np.hstack([picture.image for picture in drawn]))
            rows.append(np.hstack([palette[picture.truth].astype(np.uint8) for picture in drawn]))
    make_folder(path.parent)
    Image.fromarray(np.vstack(rows)).save(path)


if __name__ == "__main__":
    try:
        build(tyro.cli(Scenes))
    except ValueError as error:
        sys.exit(f"error: {error}")
