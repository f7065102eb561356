"""Cityscapes (19 classes) to shards: OUT/train and OUT/val, images with fine masks.

    python datasets/cityscapes.py --root cityscapes --out shards/cityscapes
    python datasets/cityscapes.py --root cityscapes --out ... --splits trainval val test
    python datasets/cityscapes.py --root cityscapes --out shards/cityscapes_half --half

ROOT holds the official folders, leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and, for every image,
gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png (0..18, 255 is unknown) or, where that is not there,
the *_gtFine_labelIds.png of the download, whose 34 label ids become the 19 classes and unknown.

    train     2,975 images
    val       500 images
    trainval  both, 3,475 images: what results on the test server are trained on
    test      1,525 images without masks, to predict

With --half everything is 512 x 1024: an image's pixel is the mean of 2 x 2 pixels, a label the most
frequent of 2 x 2 labels ("unknown" is one of them; of equally frequent ones the first by rows). So
Three-stage trains and is scored, and what PNGs take to decode is a quarter.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.tools.build import BuildReport, Options, build_pictures, command_line
from memseg_dist.tools.recipe import (
    Mask,
    Picture,
    counted,
    list_images,
    map_values,
    passed_over,
    read_pixels,
)

VOCABULARY = Path(__file__).parent / "vocabularies" / "cityscapes_19.json"
COUNTS = {"train": 2_975, "val": 500, "trainval": 3_475, "test": 1_525}
"""Images of the full data set."""
IMAGE, TRAIN_IDS, IDS = "_leftImg8bit", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
IMAGE_ENDS = (f"{IMAGE.lower()}.png",)
UNKNOWN = 255

_SCORED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
TABLES = {
    TRAIN_IDS: {UNKNOWN: -1} | {local: local for local in range(19)},
    IDS: {UNKNOWN: -1}  # -1, the license plate, in 8 bits
    | dict.fromkeys(range(34), -1)
    | {value: local for local, value in enumerate(_SCORED_IDS)},
}
"""Per end of the file's name: value in the label map -> class, -1 = unknown."""

Split = Literal["train", "val", "trainval", "test"]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Cityscapes:
    """Cityscapes to shards with masks."""

    root: Path
    """Folder with leftImg8bit/ and gtFine/."""
    options: Options
    splits: tuple[Split, ...] = ("train", "val")
    """Which splits to write."""
    half: bool = False
    """Write images and label maps at half their size."""


def build(recipe: Cityscapes) -> list[BuildReport]:
    vocabulary = Vocabulary.load(VOCABULARY)
    reports = []
    for name in recipe.splits:
        folders = ("train", "val") if name == "trainval" else (name,)
        pictures = [picture for folder in folders for picture in list_folder(recipe.root, folder)]
        images = [recipe.root / "leftImg8bit" / folder for folder in folders]
        left_out = [item for folder in images for item in passed_over(folder, IMAGE_ENDS)]
        print(f"{name}: {counted(len(pictures), COUNTS[name])}")
        reports.append(
            build_pictures(
                recipe.options.out / name,
                vocabulary,
                pictures,
                recipe.options,
                read_mask=read_half_mask if recipe.half else read_mask,
                read_image=read_half_image if recipe.half else None,
                left_out=left_out,
            )
        )
    return reports


def list_folder(root: Path, name: str) -> list[Picture]:
    """The images of all cities of an official folder; those of test have no masks.

    ValueError naming an image without a label map.
    """
    images = root / "leftImg8bit" / name
    pictures = []
    for image in list_images(images, IMAGE_ENDS):
        key = image.stem.removesuffix(IMAGE)
        mask = None
        if name != "test":
            city = root / "gtFine" / name / image.parent.relative_to(images)
            found = [city / f"{key}{end}" for end in TABLES if (city / f"{key}{end}").exists()]
            if not found:
                raise ValueError(
                    f"image {image} has no label map {city / (key + IDS)}; unpack "
                    f"gtFine_trainvaltest in {root}"
                )
            mask = str(found[0])
        pictures.append(Picture(key, str(image), mask))
    return pictures


def read_mask(path: str) -> Mask:
    table = next(table for end, table in TABLES.items() if path.endswith(end))
    return map_values(read_pixels(path), table, path)


def read_half_mask(path: str) -> Mask:
    blocks = _blocks(read_mask(path), path)
    votes = (blocks[..., :, None] == blocks[..., None, :]).sum(-1)
    return np.take_along_axis(blocks, votes.argmax(-1)[..., None], -1)[..., 0]


def read_half_image(path: str) -> bytes:
    """A PNG of half the size."""
    channels = np.moveaxis(read_pixels(path), -1, 0)
    halved = [(_blocks(channel, path).sum(-1) + 2) // 4 for channel in channels]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(halved, -1).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _blocks(pixels: NDArray[T], path: str) -> NDArray[T]:
    """[H, W] -> [H / 2, W / 2, 4]: the pixels of each block of 2 x 2."""
    height, width = pixels.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path} is {width} x {height} pixels; --half needs even sides")
    blocks = pixels.reshape(height // 2, 2, width // 2, 2).swapaxes(1, 2)
    return blocks.reshape(height // 2, width // 2, 4)


if __name__ == "__main__":
    command_line(build, Cityscapes)
