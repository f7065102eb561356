"""ADE20K to shards: OUT/train and OUT/val, images with masks.

    python datasets/ade20k.py --root ADEChallengeData2016 --out shards/ade20k_150
    python datasets/ade20k.py --root ADE20K_2021_17_01 --classes 847 --out shards/ade20k_847

150 classes: the scene parsing challenge, images/ and annotations/ {training,validation}; value 0
is "other", 1..150 the classes (20,210 + 2,000 images, 1 GB).
847 classes: the full release, images/ADE/{training,validation}/*/*/ADE_*.jpg with ADE_*_seg.png,
whose object id is R // 10 * 256 + G, and ADE_*.json. The 847 objects are those that have masks in
both splits (25,574 + 2,000 images, 7 GB). The release's pickled index is not read.

As weak labels, a job reads the same shards: `labels_from="crop"` takes the classes of the augmented
crop (as in the LarvSeg paper), `labels_from="index"` those of the whole image.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.tools.build import BuildReport, Options, build_pictures, command_line
from memseg_dist.tools.recipe import (
    Mask,
    Picture,
    Skipped,
    list_images,
    map_values,
    passed_over,
    read_pixels,
    unused_masks,
)

VOCABULARIES = Path(__file__).parent / "vocabularies"
FOLDERS = {"train": "training", "val": "validation"}
TABLE_150 = {0: -1} | {value: value - 1 for value in range(1, 151)}


@dataclass(frozen=True)
class Ade20k:
    """ADE20K, 150 or 847 classes, to shards with masks."""

    root: Path
    """ADEChallengeData2016 (150 classes) or ADE20K_2021_17_01 (847 classes)."""
    options: Options
    classes: Literal[150, 847] = 150
    """Size of the vocabulary, which says which of the two data sets ROOT is."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Which splits to write."""
    labels_only: bool = False
    """Write image labels (all classes of the image), no masks."""


def build(recipe: Ade20k) -> list[BuildReport]:
    vocabulary = Vocabulary.load(VOCABULARIES / f"ade20k_{recipe.classes}.json")
    list_split = list_challenge if recipe.classes == 150 else list_full
    read_mask = read_challenge_mask
    if recipe.classes == 847:
        read_mask = functools.partial(
            read_full_mask, object_ids=object_ids(), spellings=spellings(vocabulary)
        )
    reports = []
    for name in recipe.splits:
        pictures, left_out = list_split(recipe.root, name)
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


def list_challenge(root: Path, name: str) -> tuple[list[Picture], list[Skipped]]:
    """The 150-class release, and what is left out; ValueError naming an image without a mask."""
    images = root / "images" / FOLDERS[name]
    masks = root / "annotations" / FOLDERS[name]
    pictures = []
    for image in list_images(images, (".jpg",)):
        mask = masks / f"{image.stem}.png"
        if not mask.exists():
            raise ValueError(f"image {image} has no annotation {mask}")
        pictures.append(Picture(image.stem, str(image), str(mask)))
    unused = unused_masks(masks.glob("*.png"), pictures)
    return pictures, [*passed_over(images, (".jpg",)), *unused]


def list_full(root: Path, name: str) -> tuple[list[Picture], list[Skipped]]:
    """The full release, and what is left out; ValueError naming an image without its _seg.png."""
    folder = root / "images" / "ADE" / FOLDERS[name]
    pictures = []
    for image in list_images(folder, (".jpg",)):
        mask = image.with_name(f"{image.stem}_seg.png")
        if not mask.exists():
            raise ValueError(f"image {image} has no segmentation {mask}")
        pictures.append(Picture(image.stem, str(image), str(mask)))
    unused = unused_masks(folder.rglob("*_seg.png"), pictures)
    return pictures, [*passed_over(folder, (".jpg", ".png", ".json")), *unused]


def object_ids() -> tuple[int, ...]:
    """Per class of the 847, its object number in the full release (1-based)."""
    content = json.loads((VOCABULARIES / "ade20k_847_ids.json").read_text())
    return tuple(content["object_ids"])


def spellings(vocabulary: Vocabulary) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(sorted(category.spellings())) for category in vocabulary.categories)


def read_challenge_mask(path: str) -> Mask:
    return map_values(read_pixels(path), TABLE_150, path)


def read_full_mask(
    path: str, object_ids: tuple[int, ...], spellings: tuple[tuple[str, ...], ...]
) -> Mask:
    """Objects outside the 847 become unknown. The image's JSON tells if the numbers are ours."""
    pixels = read_pixels(path)
    if pixels.ndim != 3 or pixels.shape[2] < 2:
        raise ValueError(f"mask {path}: expected an RGB image, found shape {list(pixels.shape)}")
    numbers = pixels[..., 0] // 10 * 256 + pixels[..., 1]
    local_of = {number: local for local, number in enumerate(object_ids)}
    annotation = Path(path.removesuffix("_seg.png") + ".json")
    if annotation.exists():
        _check_names(annotation, local_of, spellings)
    table = {int(number): local_of.get(int(number), -1) for number in np.unique(numbers)}
    return map_values(numbers, table, path)


def _check_names(
    path: Path, local_of: Mapping[int, int], spellings: tuple[tuple[str, ...], ...]
) -> None:
    """ValueError if an object's number and name are not those of the class list."""
    for item in _objects(path):
        local = local_of.get(int(item["name_ndx"]))
        name = " ".join(str(item["name"]).partition(",")[0].casefold().replace("-", " ").split())
        if local is not None and name not in spellings[local]:
            raise ValueError(
                f"{path}: object number {item['name_ndx']} is {item['name']!r}, expected "
                f"{spellings[local][0]!r}; this is not the release of 2021-01-17"
            )


def _objects(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:  # some files of the release are Latin-1
        text = content.decode("latin-1")
    try:
        return list(json.loads(text)["annotation"]["object"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an annotation of ADE20K ({error!r})") from error


if __name__ == "__main__":
    command_line(build, Ade20k)
