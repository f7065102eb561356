"""COCO-Stuff (171 classes) to shards: OUT/train and OUT/val, images with masks.

    python datasets/coco_stuff.py --root coco --out shards/coco_stuff
    python datasets/coco_stuff.py --root cocostuff-10k --release 10k --out shards/coco_stuff_10k

164k: ROOT holds the official folders, images/{train,val}2017/*.jpg and
annotations/{train,val}2017/*.png. Both official label maps are read: "*_labelTrainIds.png" (0..170)
and the plain pixel maps, whose values are COCO-Stuff ids minus one (0..181, 11 of them unused); 255
is unlabelled in both. 118,287 + 5,000 images, about 21 GB; some 50 images/s and core (measured 56).

10k, version 1.1: ROOT holds images/*.jpg, annotations/*.mat and imageLists/{train,test}.txt (9,000
+ 1,000 images; OUT/val is the test list). The MATLAB files, for which scipy is needed, hold
COCO-Stuff ids (1..182) with 0 as unlabelled. Where an image has no .mat, PNG conversions are read:
"*_labelTrainIds.png", 0 = unlabelled and 1..171 as the toolboxes write them, or plain ones. Both
may be in folders {train,test}2014. PNGs in which 255 is unlabelled, as in the 164k, are told from
the others by that value.
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
from memseg_dist.tools.recipe import (
    Mask,
    Picture,
    counted,
    list_images,
    map_values,
    passed_over,
    read_matlab,
    read_names,
    read_pixels,
)

VOCABULARY = Path(__file__).parent / "vocabularies" / "coco_stuff_171.json"
COUNTS = {"164k": {"train": 118_287, "val": 5_000}, "10k": {"train": 9_000, "val": 1_000}}
"""Images of the full data sets."""
NUM_CLASSES = 171
UNLABELLED = 255
UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
"""COCO-Stuff ids, of 1..182, that no image has."""

Release = Literal["164k", "10k"]
Split = Literal["train", "val"]
Encoding = Literal["train_ids", "ids", "train_ids_from_1", "ids_from_1"]

_CLASS_IDS = [value for value in range(1, 183) if value not in UNUSED_IDS]
TABLES = {
    "train_ids": {UNLABELLED: -1} | {local: local for local in range(NUM_CLASSES)},
    "ids": {UNLABELLED: -1} | {value - 1: local for local, value in enumerate(_CLASS_IDS)},
    "train_ids_from_1": {0: -1} | {local + 1: local for local in range(NUM_CLASSES)},
    "ids_from_1": {0: -1} | {value: local for local, value in enumerate(_CLASS_IDS)},
}
"""Per encoding: value in the label map -> class, -1 = unlabelled."""


@dataclass(frozen=True)
class CocoStuff:
    """COCO-Stuff 164k or 10k to shards with masks."""

    root: Path
    """Folder with images/ and annotations/ (or, in small samples, {train,val}_img and _label)."""
    options: Options
    release: Release = "164k"
    """Which of the two data sets ROOT holds."""
    splits: tuple[Split, ...] = ("train", "val")
    """Which splits to write."""
    encoding: Literal["auto"] | Encoding = "auto"
    """What the values in PNG label maps are; auto = by file name, else by the values."""
    labels_only: bool = False
    """Write image labels, no masks."""


def build(recipe: CocoStuff) -> list[BuildReport]:
    vocabulary = Vocabulary.load(VOCABULARY)
    reports = []
    for name in recipe.splits:
        pictures = (list_split if recipe.release == "164k" else list_10k)(recipe.root, name)
        left_out = []
        if recipe.release == "164k":
            left_out = passed_over(split_folders(recipe.root, name)[0], (".jpg",))
        encoding = recipe.encoding
        if encoding == "auto":
            masks = [picture.mask for picture in pictures if picture.mask]
            encoding = detect_encoding(masks, recipe.release)
        count = counted(len(pictures), COUNTS[recipe.release][name])
        print(f"{name}: {count}, label maps hold {encoding}")
        read_mask = functools.partial(read_label_map, encoding=encoding)
        reports.append(
            build_pictures(
                recipe.options.out / name,
                vocabulary,
                pictures,
                recipe.options,
                read_mask=read_mask,
                labels_only=recipe.labels_only,
                left_out=left_out,
            )
        )
    return reports


def split_folders(root: Path, name: str) -> tuple[Path, Path]:
    """Where the 164k's images and its label maps are."""
    if not (root / "images" / f"{name}2017").is_dir() and (root / f"{name}_img").is_dir():
        return root / f"{name}_img", root / f"{name}_label"
    return root / "images" / f"{name}2017", root / "annotations" / f"{name}2017"


def list_split(root: Path, name: str) -> list[Picture]:
    """The 164k's images with their label maps; ValueError naming an image without one."""
    images, masks = split_folders(root, name)
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


def list_10k(root: Path, name: Split) -> list[Picture]:
    """The 10k's images with their label maps; ValueError naming what is not there."""
    folder = "test" if name == "val" else name
    hint = "give the folder that holds imageLists/, images/ and annotations/ of the 10k"

    def find(kind: str, *files: str) -> str:
        places = [root / kind / sub / file for file in files for sub in ("", f"{folder}2014")]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise ValueError(f"no {places[0]}, which is in the list {folder}.txt; {hint}")
        return str(found)

    return [
        Picture(
            key,
            find("images", f"{key}.jpg"),
            find("annotations", f"{key}.mat", f"{key}_labelTrainIds.png", f"{key}.png"),
        )
        for key in read_names(root / "imageLists" / f"{folder}.txt", hint)
    ]


def detect_encoding(
    masks: Sequence[str], release: Release = "164k", num_looked_at: int = 64
) -> Encoding:
    """By file name; else by the values of maps all over the list.

    Only raw ids reach 171..181. In PNGs of the 10k, 0 is unlabelled unless 255 is there.
    ValueError if these maps do not tell.
    """
    pngs = [path for path in masks if not path.endswith(".mat")]
    if masks and not pngs:
        return "ids_from_1"
    named = bool(pngs) and all(path.endswith("_labelTrainIds.png") for path in pngs)
    if named and release == "164k":
        return "train_ids"
    values: set[int] = set()
    step = max(1, len(pngs) // num_looked_at)
    for path in pngs[::step]:
        values |= set(np.unique(read_pixels(path)).tolist())
    from_1 = release == "10k" and UNLABELLED not in values
    from_0 = {value - int(from_1) for value in values}
    if release == "164k" or values & {0, UNLABELLED}:
        if not named and from_0 & set(range(NUM_CLASSES, UNLABELLED)):
            return "ids_from_1" if from_1 else "ids"
        if named or from_0 & {value - 1 for value in UNUSED_IDS}:
            return "train_ids_from_1" if from_1 else "train_ids"
    raise ValueError(
        f"cannot tell what the label maps beside {pngs[0] if pngs else '?'} hold: their values "
        f"{sorted(values)[:12]}... fit several forms; give --encoding ({', '.join(TABLES)})"
    )


def read_label_map(path: str, encoding: Encoding) -> Mask:
    """uint16 [H, W] of a PNG in that encoding, or of a .mat, which holds ids from 1."""
    if path.endswith(".mat"):
        pixels = read_matlab(path, ("S",), "put PNG conversions in the place of the .mat files")
        return map_values(pixels, TABLES["ids_from_1"], path)
    return map_values(read_pixels(path), TABLES[encoding], path)


if __name__ == "__main__":
    command_line(build, CocoStuff)
