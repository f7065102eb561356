"""PASCAL VOC 2012 with SBD's images to shards: OUT/train_aug (image labels), OUT/train, OUT/val.

    python datasets/voc2012.py --root VOCdevkit/VOC2012 --out shards/voc2012
    python datasets/voc2012.py --root VOCdevkit/VOC2012 --sbd benchmark_RELEASE/dataset --out ...

ROOT holds the official JPEGImages/*.jpg, Annotations/*.xml, SegmentationClass/*.png and
ImageSets/Segmentation/{train,val}.txt. Which images SBD adds is read from the names of
ROOT/SegmentationClassAug/*.png, or with --sbd from SBD's own train.txt and val.txt; their masks are
those PNGs, or SBD's cls/*.mat, for which scipy is needed.

    train_aug  VOC's train with SBD's train and val without VOC's val: 10,582 images, about 1.2 GB
    train      1,464 images with masks, to score pseudo labels on
    val        1,449 images with masks

Image labels are the classes of all objects in the Annotations, "difficult" ones too (the usual
image labels of weakly supervised segmentation), or with --labels-from masks those of the masks.
"background" is a class of the masks and never an image label where no mask is written; a run on
image labels takes train_aug, or a split that has masks with hide_mask=True and
exclude=("background",). Value 255 is unknown.

For training on a few masks, write those of train_aug: VOC's own train list is kept with its shards
as the split "train", of which PseudoSeg draws.

    python datasets/voc2012.py --root ... --out shards/voc2012 --with-masks
    memseg data split shards/voc2012/train_aug --protocol voc --within train
"""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.tools.build import BuildReport, Options, build_pictures, command_line
from memseg_dist.tools.recipe import (
    Mask,
    Picture,
    counted,
    map_values,
    read_matlab,
    read_names,
    read_pixels,
)
from memseg_dist.tools.splits import write_splits

VOCABULARY = Path(__file__).parent / "vocabularies" / "voc_21.json"
COUNTS = {"train_aug": 10_582, "train": 1_464, "val": 1_449}
"""Images of the full data set."""
TABLE = {255: -1} | {value: value for value in range(21)}
ROOT_HINT = "give --root VOCdevkit/VOC2012 (and --sbd)"
NO_SCIPY_HINT = "put the PNGs of SegmentationClassAug into the root and leave out --sbd"

Split = Literal["train_aug", "train", "val"]


@dataclass(frozen=True)
class Voc2012:
    """VOC 2012 and SBD to shards."""

    root: Path
    """VOCdevkit/VOC2012."""
    options: Options
    sbd: Path | None = None
    """SBD's benchmark_RELEASE/dataset; default: ROOT/SegmentationClassAug instead."""
    splits: tuple[Split, ...] = ("train_aug", "train", "val")
    """Which splits to write."""
    labels_from: Literal["annotations", "masks"] = "annotations"
    """Where image labels come from; a mask that is written adds its classes in any case."""
    with_masks: bool = False
    """Write the masks of train_aug too."""


def build(recipe: Voc2012) -> list[BuildReport]:
    vocabulary = Vocabulary.load(VOCABULARY)
    reports = []
    for name in recipe.splits:
        labels_only = name == "train_aug" and not recipe.with_masks
        pictures = list_split(recipe, name, vocabulary)
        print(f"{name}: {_counted(name, pictures)}")
        reports.append(
            build_pictures(
                recipe.options.out / name,
                vocabulary,
                pictures,
                recipe.options,
                read_mask=functools.partial(read_mask, with_background=not labels_only),
                labels_only=labels_only,
            )
        )
        if name == "train_aug":
            keep_train_list(recipe)
    return reports


def keep_train_list(recipe: Voc2012) -> None:
    """The split "train" of train_aug: VOC's own list, without what was not written."""
    out = str(recipe.options.out / "train_aug")
    names = _listed(recipe.root, "train")
    rows = Index.open(out).rows_of(names)
    keys = [name for name, row in zip(names, rows, strict=True) if row >= 0]
    if keys:
        write_splits(out, {"train": keys}, overwrite=True)
    print(f"train_aug: the split 'train' has {counted(len(keys), COUNTS['train'])}")


def _counted(name: str, pictures: list[Picture]) -> str:
    text = counted(len(pictures), COUNTS[name])
    pairs = sum(len(picture.labels) for picture in pictures)
    return f"{text}, {pairs:,} pairs of image and annotated class" if pairs else text


def list_split(recipe: Voc2012, name: Split, vocabulary: Vocabulary) -> list[Picture]:
    """The split's images by name; ValueError naming an image, a mask or an annotation not there."""
    root = recipe.root
    masks = {stem: root / "SegmentationClass" / f"{stem}.png" for stem in _listed(root, name)}
    if name == "train_aug":
        held_out = set(_listed(root, "val"))
        masks = added_masks(recipe) | masks  # VOC's own masks are the finer ones
        masks = {stem: path for stem, path in masks.items() if stem not in held_out}
    needs_mask = name != "train_aug" or recipe.with_masks or recipe.labels_from == "masks"
    pictures = []
    for stem, mask in sorted(masks.items()):
        image = root / "JPEGImages" / f"{stem}.jpg"
        for path in (image, mask) if needs_mask else (image,):
            if not path.exists():
                raise ValueError(f"{name}: image {stem!r} has no {path}; unpack the data set anew")
        labels: tuple[int, ...] = ()
        if recipe.labels_from == "annotations":
            labels = annotated_classes(root / "Annotations" / f"{stem}.xml", vocabulary)
        pictures.append(Picture(stem, str(image), str(mask) if needs_mask else None, labels))
    return pictures


def _listed(root: Path, name: Split) -> list[str]:
    """The names in ImageSets/Segmentation; those of train for train_aug."""
    path = root / "ImageSets/Segmentation" / f"{name.removesuffix('_aug')}.txt"
    return read_names(path, ROOT_HINT)


def added_masks(recipe: Voc2012) -> dict[str, Path]:
    """SBD's images -> their masks, VOC's val among them."""
    if recipe.sbd is not None:
        lists = [recipe.sbd / "train.txt", recipe.sbd / "val.txt"]
        names = [name for path in lists for name in read_names(path, ROOT_HINT)]
        return {name: recipe.sbd / "cls" / f"{name}.mat" for name in names}
    folder = recipe.root / "SegmentationClassAug"
    found = {path.stem: path for path in folder.glob("*.png")}
    if not found:
        raise ValueError(
            f"train_aug needs SBD: no PNGs in {folder}; put SegmentationClassAug there, give "
            "--sbd benchmark_RELEASE/dataset, or leave train_aug out by --splits train val"
        )
    return found


def annotated_classes(path: Path, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The classes of all objects of an annotation, ascending; ValueError for another name."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"annotation {path} cannot be read ({error}); restore the file") from error
    names = {str(item.findtext("name")).strip() for item in root.findall("object")}
    unknown = sorted(names - set(vocabulary.names[1:]))
    if unknown:
        raise ValueError(f"annotation {path}: {unknown} are no classes of VOC 2012; restore it")
    return tuple(sorted(vocabulary.names.index(name) for name in names))


def read_mask(path: str, with_background: bool = True) -> Mask:
    """A palette or grey PNG, or SBD's .mat; background is unknown unless it is asked for."""
    if path.endswith(".mat"):
        pixels = read_matlab(path, ("GTcls", "Segmentation"), NO_SCIPY_HINT)
    else:
        pixels = read_pixels(path)
    return map_values(pixels, TABLE if with_background else TABLE | {0: -1}, path)


if __name__ == "__main__":
    command_line(build, Voc2012)
