"""COCO-Stuff 164k (171 classes) to shards: OUT/train and OUT/val, images with masks.

    python datasets/coco_stuff.py --root coco --out shards/coco_stuff

ROOT holds the official folders, images/{train,val}2017/*.jpg and annotations/{train,val}2017/*.png.
Both official label maps are read: "*_labelTrainIds.png" (0..170) and the plain pixel maps, whose
values are COCO-Stuff ids minus one (0..181, 11 of them unused); 255 is unlabelled in both.
118,287 + 5,000 images, about 21 GB; some 50 images/s and core (measured 56).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.tools.build import BuildReport, Options, build_pictures, command_line
from memseg_dist.tools.recipe import Mask, Picture, list_images, map_values, read_pixels

VOCABULARY = Path(__file__).parent / "vocabularies" / "coco_stuff_171.json"
NUM_CLASSES = 171
UNLABELLED = 255
UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
"""COCO-Stuff ids, of 1..182, that no image has."""

Encoding = Literal["auto", "train_ids", "ids"]

_CLASS_IDS = [value for value in range(1, 183) if value not in UNUSED_IDS]
TABLES = {
    "train_ids": {UNLABELLED: -1} | {local: local for local in range(NUM_CLASSES)},
    "ids": {UNLABELLED: -1} | {value - 1: local for local, value in enumerate(_CLASS_IDS)},
}
"""Per encoding: value in the label map -> class, -1 = unlabelled."""


@dataclass(frozen=True)
class CocoStuff:
    """COCO-Stuff 164k to shards with masks."""

    root: Path
    """Folder with images/ and annotations/ (or, in small samples, {train,val}_img and _label)."""
    options: Options
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    encoding: Encoding = "auto"
    """What the label maps' values are; auto = by file name, else by the values in the maps."""
    labels_only: bool = False
    """Write image labels, no masks."""


def build(recipe: CocoStuff) -> list[BuildReport]:
    vocabulary = Vocabulary.load(VOCABULARY)
    reports = []
    for name in recipe.splits:
        pictures = list_split(recipe.root, name)
        encoding = recipe.encoding
        if encoding == "auto":
            encoding = detect_encoding([picture.mask for picture in pictures if picture.mask])
        print(f"{name}: {len(pictures)} images, label maps hold {encoding}")
        read_mask = functools.partial(read_label_map, encoding=encoding)
        reports.append(
            build_pictures(
                recipe.options.out / name,
                vocabulary,
                pictures,
                recipe.options,
                read_mask=read_mask,
                labels_only=recipe.labels_only,
            )
        )
    return reports


def list_split(root: Path, name: str) -> list[Picture]:
    """The split's images with their label maps; ValueError naming an image without one."""
    images, masks = root / "images" / f"{name}2017", root / "annotations" / f"{name}2017"
    if not images.is_dir() and (root / f"{name}_img").is_dir():
        images, masks = root / f"{name}_img", root / f"{name}_label"
    if not images.is_dir():
        raise ValueError(f"no folder {images}; give the folder that holds images/")
    if not masks.is_dir():
        raise ValueError(f"no label maps at {masks}; unpack stuffthingmaps_trainval2017 there")
    label_maps = {path.name.removesuffix(".png"): path for path in masks.glob("*.png")}
    pictures = []
    for image in list_images(images, (".jpg",)):
        mask = label_maps.get(f"{image.stem}_labelTrainIds") or label_maps.get(image.stem)
        if mask is None:
            raise ValueError(f"image {image} has no label map {masks / (image.stem + '.png')}")
        pictures.append(Picture(image.stem, str(image), str(mask)))
    return pictures


def detect_encoding(masks: Sequence[str], num_looked_at: int = 64) -> Literal["train_ids", "ids"]:
    """By file name; else by the values of maps all over the list: only raw ids reach 171..181.

    ValueError if these maps do not tell.
    """
    if masks and all(path.endswith("_labelTrainIds.png") for path in masks):
        return "train_ids"
    values: set[int] = set()
    step = max(1, len(masks) // num_looked_at)
    for path in masks[::step]:
        values |= set(np.unique(read_pixels(path)).tolist())
    if values & set(range(NUM_CLASSES, UNLABELLED)):
        return "ids"
    if values & {value - 1 for value in UNUSED_IDS}:
        return "train_ids"
    raise ValueError(
        f"cannot tell what the label maps beside {masks[0] if masks else '?'} hold: their values "
        f"{sorted(values)[:12]}... fit both official forms; give --encoding train_ids or ids"
    )


def read_label_map(path: str, encoding: Literal["train_ids", "ids"]) -> Mask:
    return map_values(read_pixels(path), TABLES[encoding], path)


if __name__ == "__main__":
    command_line(build, CocoStuff)
