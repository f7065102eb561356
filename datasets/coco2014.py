"""COCO 2014 to shards for weak supervision: OUT/train (image labels), OUT/val (masks).

    python datasets/coco2014.py --root coco --out shards/coco2014
    python datasets/coco2014.py --root coco --out shards/coco2017 --year 2017 --with-masks

ROOT holds the official train2014/*.jpg, val2014/*.jpg and in annotations/ the files
instances_{train,val}2014.json (82,783 + 40,504 images, 19 GB). The 80 classes are in the order of
COCO's ids, after "background". --year 2017: the same images divided otherwise, 118,287 + 5,000,
which with masks are what `memseg data split --protocol coco` draws of.

Image labels are the classes of all instances, crowds too: a crowd of people shows people. Images
without an instance are kept, with no label, and counted. Masks are painted from the instances in
order of descending area, so that the small ones end up on top; a polygon holds the pixels whose
centres are inside it, by the even-odd rule, and the polygons of an instance are united. What no
instance covers is background. pycocotools is not needed.

A small sample goes the same way: ROOT with index.json, images/ and masks/ (8 bit, 0..79 = class,
255 = background); its train split has masks as well, so that pseudo labels can be scored on it. A
run on image labels takes a split that has masks with hide_mask=True and exclude=("background",).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memseg_dist.data.files import read_json
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.tools.build import (
    BuildReport,
    Options,
    ShardTask,
    build_dataset,
    build_pictures,
    command_line,
)
from memseg_dist.tools.recipe import (
    Mask,
    Picture,
    Skipped,
    cut_into_shards,
    files_stamp,
    image_sample,
    map_values,
    read_file,
    read_pixels,
)
from memseg_dist.tools.shards import Sample

VOCABULARY = Path(__file__).parent / "vocabularies" / "coco_81.json"
SAMPLE_TABLE = {255: 0} | {value: value + 1 for value in range(80)}
"""Value in a sample's mask -> class."""

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Coco2014:
    """COCO 2014's 80 classes and background to shards."""

    root: Path
    """Folder with train2014/, val2014/ and annotations/; or with index.json, images/, masks/."""
    options: Options
    splits: tuple[Split, ...] = ("train", "val")
    """Which splits to write."""
    with_masks: bool = False
    """Write the masks of train too."""
    year: Literal[2014, 2017] = 2014
    """Whose division into train and val; read from train<year>/, val<year>/ and their lists."""


@dataclass(frozen=True)
class Annotated:
    """An image with its instances.

    objects: JSON of [class, segmentation], first to paint first; "" to write no mask.
    """

    key: str
    image: str
    size: tuple[int, int]
    labels: tuple[int, ...]
    objects: str = ""


def build(recipe: Coco2014) -> list[BuildReport]:
    vocabulary = Vocabulary.load(VOCABULARY)
    if (recipe.root / "index.json").exists():
        return [build_sample(recipe, name, vocabulary) for name in recipe.splits]
    return [build_official(recipe, name, vocabulary) for name in recipe.splits]


# --------------------------------------------------------------------------------- official files


def build_official(recipe: Coco2014, name: Split, vocabulary: Vocabulary) -> BuildReport:
    options = recipe.options
    folder, with_masks = f"{name}{recipe.year}", name == "val" or recipe.with_masks
    images = list_split(recipe.root, folder, vocabulary, with_masks)
    unlabelled = sum(not image.labels for image in images)
    print(f"{name}: {len(images):,} images, {unlabelled:,} of them without an instance")
    chunks = cut_into_shards(
        images,
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.megabytes_per_shard * 2**20,
        num_bytes=_num_bytes,
        shuffle_seed=options.shuffle_seed,
        limit=options.limit,
    )
    tasks = [ShardTask(samples, chunk) for chunk in chunks]
    stamp = files_stamp(image.image for chunk in chunks for image in chunk)
    return build_dataset(options.out / name, vocabulary, tasks, options, stamp=stamp)


def list_split(
    root: Path, folder: str, vocabulary: Vocabulary, with_masks: bool
) -> list[Annotated]:
    """The images of a folder, such as "val2014", by name; ValueError naming one that is missing."""
    path = root / "annotations" / f"instances_{folder}.json"
    content = read_json(path)
    class_of = _classes(content["categories"], vocabulary, path)
    instances: dict[int, list[dict[str, Any]]] = {item["id"]: [] for item in content["images"]}
    for item in content["annotations"]:
        if item["image_id"] not in instances:
            raise ValueError(f"{path}: annotation {item['id']} is of no listed image")
        instances[item["image_id"]].append(item)
    images = []
    for item in sorted(content["images"], key=lambda item: item["file_name"]):
        file = root / folder / item["file_name"]
        if not file.exists():
            raise ValueError(f"{path}: image {file} is missing; unpack {folder}.zip in {root}")
        found = sorted(instances[item["id"]], key=lambda each: (-each["area"], each["id"]))
        objects = [[class_of[each["category_id"]], each["segmentation"]] for each in found]
        images.append(
            Annotated(
                key=file.stem,
                image=str(file),
                size=(item["height"], item["width"]),
                labels=tuple(sorted({label for label, _ in objects})),
                objects=json.dumps(objects) if with_masks else "",
            )
        )
    return images


def _classes(
    categories: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, path: Path
) -> dict[int, int]:
    """COCO's category id -> class; ValueError unless these are the 80 in their order."""
    ordered = sorted(categories, key=lambda item: item["id"])
    names = [item["name"] for item in ordered]
    wanted = list(vocabulary.names[1:])
    if names != wanted:
        differing = [pair for pair in zip(names, wanted, strict=False) if pair[0] != pair[1]][:3]
        raise ValueError(
            f"{path}: its {len(names)} categories are not COCO's 80 (file, expected: {differing}); "
            "give the official instances file"
        )
    return {item["id"]: number for number, item in enumerate(ordered, start=1)}


def _num_bytes(image: Annotated) -> int:
    return Path(image.image).stat().st_size


def samples(images: Sequence[Annotated]) -> Iterator[Sample | Skipped]:
    for image in images:
        mask = paint(json.loads(image.objects), image) if image.objects else None
        yield image_sample(image.key, read_file(image.image), image.labels, mask)


def paint(objects: Sequence[tuple[int, Any]], image: Annotated) -> Mask:
    """uint16 [H, W] of classes, 0 where there is no instance; a later object covers earlier ones.

    ValueError naming the image for a segmentation that is neither polygons nor a list of runs.
    """
    mask = np.zeros(image.size, np.uint16)
    for label, segmentation in objects:
        try:
            if isinstance(segmentation, dict):
                mask[decode_runs(segmentation["counts"], *image.size)] = label
                continue
            for polygon in segmentation:
                mask[fill_polygon(np.asarray(polygon, float).reshape(-1, 2), *image.size)] = label
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"image {image.image}: an instance of class {label} cannot be painted ({error}); "
                "give the official instances file"
            ) from error
    return mask


def decode_runs(counts: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """[H, W] of COCO's uncompressed run lengths: column by column, outside and inside by turns."""
    if isinstance(counts, str) or sum(counts) != height * width:
        raise ValueError(f"runs {str(counts)[:40]}... do not add up to {height} x {width} pixels")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def fill_polygon(corners: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """[H, W]: pixels whose centres are inside the polygon of `corners` (x, y), even-odd rule.

    (Pillow's polygons hold the pixels that the outline touches too: 25 for a square of 4 x 4.)
    """
    (x1, y1), (x2, y2) = corners.T, np.roll(corners, -1, axis=0).T
    top, bottom = np.clip((np.floor(y1.min()), np.ceil(y1.max())), 0, height).astype(np.int64)
    centres = np.arange(top, bottom) + 0.5
    crossed = (y1[:, None] <= centres) != (y2[:, None] <= centres)  # [edges, rows]
    edge, row = np.nonzero(crossed)
    slope = (x2[edge] - x1[edge]) / (y2[edge] - y1[edge])
    x = x1[edge] + (centres[row] - y1[edge]) * slope
    first = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)  # first pixel right of the edge
    toggles = np.bincount(row * (width + 1) + first, minlength=len(centres) * (width + 1))
    inside = np.zeros((height, width), np.bool_)
    inside[top:bottom] = np.cumsum(toggles.reshape(-1, width + 1), axis=1)[:, :width] % 2
    return inside


# ---------------------------------------------------------------------------------- small samples


def build_sample(recipe: Coco2014, name: Split, vocabulary: Vocabulary) -> BuildReport:
    path = recipe.root / "index.json"
    content = read_json(path)
    if list(content["classes"]) != list(vocabulary.names[1:]):
        raise ValueError(f"{path}: its classes are not COCO's 80 in the order of their ids")
    pictures = []
    for item in content["images"]:
        image = recipe.root / "images" / item["file"]
        mask = (recipe.root / "masks" / item["file"]).with_suffix(".png")
        if item["split"] == name:
            labels = tuple(sorted(label + 1 for label in item["labels"]))
            pictures.append(Picture(image.stem, str(image), str(mask), labels))
    return build_pictures(
        recipe.options.out / name,
        vocabulary,
        pictures,
        recipe.options,
        read_mask=read_sample_mask,
    )


def read_sample_mask(path: str) -> Mask:
    return map_values(read_pixels(path), SAMPLE_TABLE, path)


if __name__ == "__main__":
    command_line(build, Coco2014)
