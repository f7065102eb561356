"""LIP's or CIHP's human parsing (20 classes) to shards: OUT/train and OUT/val, with masks.

    python datasets/lip.py --root LIP --out shards/lip
    python datasets/lip.py --dataset cihp --root instance-level_human_parsing --out shards/cihp

LIP, 30,462 + 10,000 images: {train,val}_images/*.jpg, {train,val}_segmentations/*.png and the lists
{train,val}_id.txt, each below ROOT or in its folder of the download, TrainVal_images and
TrainVal_parsing_annotations, which some archives hold doubled (TrainVal_images/TrainVal_images).
CIHP, 28,280 + 5,000 images: {Training,Validation}/{Images,Category_ids} below ROOT or its folder
instance-level_human_parsing. In both, label maps are grey PNGs of class ids; 255 is unknown.

The class lists differ in one place: value 10 is "jumpsuits" in LIP and "torso-skin" in CIHP. MCIBI
scores models of LIP on CIHP as if the classes were the same, which can only mean by position, so
that is the default here and gives scores to compare with its table 4. It also scores torso skin
as jumpsuits: --torso-skin ignore leaves those pixels out, --torso-skin class gives CIHP a class of
its own (to train on CIHP, or in a union with LIP).

A left arm mirrored is a right arm: a flip of images must exchange the classes of LEFT_RIGHT.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.build import BuildReport, Options, build_pictures, command_line
from memseg_dist.tools.recipe import (
    Mask,
    Picture,
    counted,
    list_images,
    map_values,
    passed_over,
    read_names,
    read_pixels,
)

VOCABULARY = Path(__file__).parent / "vocabularies" / "lip_20.json"
LEFT_RIGHT = tuple((f"name:left {part}", f"name:right {part}") for part in ("arm", "leg", "shoe"))
"""Uids of the classes that a horizontal flip exchanges."""
COUNTS = {
    "lip": {"train": 30_462, "val": 10_000},
    "cihp": {"train": 28_280, "val": 5_000},
}
"""Images of the full data sets."""
TABLE = {255: -1} | {value: value for value in range(20)}
TORSO_SKIN = 10
"""Value in CIHP's label maps; LIP's "jumpsuits"."""
TORSO_SKIN_CLASS = Category("name:torso skin", "torso skin")
CIHP_FOLDERS = {"train": "Training", "val": "Validation"}

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Lip:
    """LIP or CIHP to shards with masks."""

    root: Path
    """Folder that the archives were unpacked in."""
    options: Options
    dataset: Literal["lip", "cihp"] = "lip"
    """Which of the two data sets ROOT holds."""
    splits: tuple[Split, ...] = ("train", "val")
    """Which splits to write."""
    torso_skin: Literal["jumpsuits", "ignore", "class"] = "jumpsuits"
    """What CIHP's torso skin is: LIP's class of the same number, unknown, or its own class."""


def build(recipe: Lip) -> list[BuildReport]:
    if recipe.dataset == "lip" and recipe.torso_skin != "jumpsuits":
        raise ValueError(
            f"--torso-skin {recipe.torso_skin}: LIP has no torso skin; give --dataset cihp"
        )
    vocabulary = Vocabulary.load(VOCABULARY)
    if recipe.torso_skin == "class":
        categories = [*vocabulary.categories]
        categories[TORSO_SKIN] = TORSO_SKIN_CLASS
        vocabulary = dataclasses.replace(vocabulary, categories=tuple(categories))
    read = functools.partial(read_mask, without_torso_skin=recipe.torso_skin == "ignore")
    list_split = list_lip if recipe.dataset == "lip" else list_cihp
    reports = []
    for name in recipe.splits:
        pictures = list_split(recipe.root, name)
        print(f"{name}: {counted(len(pictures), COUNTS[recipe.dataset][name])}")
        out = recipe.options.out / name
        left_out = []
        if recipe.dataset == "cihp":
            left_out = passed_over(cihp_folder(recipe.root, name) / "Images", (".jpg",))
        reports.append(
            build_pictures(
                out, vocabulary, pictures, recipe.options, read_mask=read, left_out=left_out
            )
        )
    return reports


def list_lip(root: Path, name: Split) -> list[Picture]:
    """The images of NAME_id.txt; ValueError naming what is not there."""
    images, masks = "TrainVal_images", "TrainVal_parsing_annotations"
    fix = "give --root the folder that LIP's archives were unpacked in"
    stems = read_names(_unpacked(root, images, f"{name}_id.txt"), fix)
    return _pictures(
        _unpacked(root, images, f"{name}_images"),
        _unpacked(root, masks, f"{name}_segmentations"),
        stems,
    )


def _unpacked(root: Path, archive: str, item: str) -> Path:
    """Where an archive's file or folder is: under its folder, its doubled folder, or `root`."""
    places = [root / archive / item, root / archive / archive / item, root / item]
    return next((place for place in places if place.exists()), places[0])


def cihp_folder(root: Path, name: Split) -> Path:
    return _unpacked(root, "instance-level_human_parsing", CIHP_FOLDERS[name])


def list_cihp(root: Path, name: Split) -> list[Picture]:
    """All images of a folder; ValueError naming what is not there."""
    folder = cihp_folder(root, name)
    stems = [image.stem for image in list_images(folder / "Images", (".jpg",))]
    return _pictures(folder / "Images", folder / "Category_ids", stems)


def _pictures(images: Path, masks: Path, stems: Sequence[str]) -> list[Picture]:
    pictures = []
    for stem in stems:
        image, mask = images / f"{stem}.jpg", masks / f"{stem}.png"
        for path in (image, mask):
            if not path.exists():
                raise ValueError(f"image {stem!r} has no {path}; unpack the data set anew")
        pictures.append(Picture(stem, str(image), str(mask)))
    return pictures


def read_mask(path: str, without_torso_skin: bool = False) -> Mask:
    """A grey PNG of class ids; torso skin becomes unknown on demand."""
    table = TABLE | {TORSO_SKIN: -1} if without_torso_skin else TABLE
    return map_values(read_pixels(path), table, path)


if __name__ == "__main__":
    command_line(build, Lip)
