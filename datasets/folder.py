"""Your own pictures to shards.

    folder.py masks   --images IMAGES --masks MASKS --classes classes.txt --out shards/mine
    folder.py masks   ... --unlabelled --values values.json   # masks of some images and classes
    folder.py classes --root FOLDER --out shards/mine         # FOLDER/dog/1.jpg, FOLDER/cat/...
    folder.py table   --table labels.csv --images IMAGES --classes classes.txt --out shards/mine
    folder.py index-json --index index.json --split train --out shards/mine

Class lists (--classes): a text file with one name a line, in the order of the ids (more columns, by
tabs: uid, synonyms by commas); a JSON list of names, {"classes": [names]}, or a vocabulary.json.
A class without a uid gets that of the same-named class of --uids VOCABULARY (such as
datasets/vocabularies/coco_stuff_171.json), so that it is one class with that data set's; else
"name:dog", but the background the uid that pseudo labels give theirs. The commands that turn the
sample data of the project's checks into shards are in docs/results.md.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from memseg_dist.checks import require
from memseg_dist.data.files import read_json, read_text, write_atomically
from memseg_dist.data.vocabulary import BACKGROUND, Category, Vocabulary, fold
from memseg_dist.jsonable import decode
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
from memseg_dist.tools.shards import escape_key

NO_UID = "?"
MASK_SUFFIXES = (".png",)


@dataclass(frozen=True)
class Masks:
    """A folder of images and a folder of label maps with the same file names."""

    images: Path
    """Folder of the images, with sub-folders."""
    masks: Path
    """Grey or palette PNG; a pixel's value is its class's place in the class list."""
    classes: Path
    """Class list, in the order of the values."""
    options: Options
    ignore: tuple[int, ...] = (255,)
    """Values of pixels without a label."""
    first_value: int = 0
    """The value of the first class (1 where 0 means background to ignore: add --ignore 0)."""
    values: Path | None = None
    """JSON {value: class of the list, or null for no label} where values are not places in the list
    or several are one class; "*" is all other values: {"7": "road", "8": "road", "*": null}."""
    unlabelled: bool = False
    """Take images without a mask as unlabelled ones; else such an image is an error."""
    labels_only: bool = False
    """Write the classes of the mask as image labels, and no mask."""
    uids: Path | None = None
    """Vocabulary to take uids from, by name."""

    def __post_init__(self) -> None:
        if self.values is not None and self.first_value:
            raise ValueError(f"--first-value {self.first_value} goes without --values")


@dataclass(frozen=True)
class Classes:
    """One folder of images per class, named by the class or by its WordNet id."""

    root: Path
    """Folder of the class folders."""
    options: Options
    classes: Path | None = None
    """Class list; the folders' names if not given."""
    uids: Path | None = None
    """Vocabulary to take uids from, by name."""


@dataclass(frozen=True)
class Table:
    """Image labels in a CSV (path,label;label) or JSON ({path: [labels]} or [[path, labels]])."""

    table: Path
    """The .csv or .json file."""
    images: Path
    """Folder that the paths in the table start from."""
    options: Options
    classes: Path | None = None
    """Class list; all labels of the table, by name, if not given."""
    uids: Path | None = None
    """Vocabulary to take uids from, by name."""


@dataclass(frozen=True)
class IndexJson:
    """An index.json: {"classes": [names], "ignore": 255, "images": [{"file", "split", "labels"}]}
    with images/ and masks/ beside it; or, for single labels, {"coco80_classes": [names], "images":
    [{"file", "wnid", "name", "coco80": id or null}]}, where an image without a class of the list
    gets the class of its own wnid or name."""

    index: Path
    """The index.json."""
    options: Options
    split: str | None = None
    """Only images of this split."""
    labels_only: bool = False
    """Write image labels and no masks."""
    uids: Path | None = None
    """Vocabulary to take uids from, by name."""
    drop_empty_classes: bool = False
    """Leave classes without an image out of the vocabulary."""
    listed_classes_only: bool = False
    """Leave out images of a class outside the list."""
    shuffle_labels: int | None = None
    """Permute the labels among the images by this seed: the control that should teach nothing."""


Recipe = (
    Annotated[Masks, tyro.conf.subcommand("masks")]
    | Annotated[Classes, tyro.conf.subcommand("classes")]
    | Annotated[Table, tyro.conf.subcommand("table")]
    | Annotated[IndexJson, tyro.conf.subcommand("index-json")]
)


def build(recipe: Masks | Classes | Table | IndexJson) -> BuildReport:
    if isinstance(recipe, Masks):
        return build_masks(recipe)
    if isinstance(recipe, Classes):
        return build_classes(recipe)
    return build_table(recipe) if isinstance(recipe, Table) else build_index_json(recipe)


def check_once(pictures: Sequence[Picture], origin: Path) -> None:
    """ValueError for pictures whose samples would have one key."""
    twice = [key for key, count in Counter(item.key for item in pictures).items() if count > 1]
    if twice:
        raise ValueError(f"{origin}: more than one image would be {twice[0]!r}; list each once")


def build_masks(recipe: Masks) -> BuildReport:
    vocabulary = read_classes(recipe.classes, recipe.uids)
    pictures = []
    left_out = passed_over(recipe.images)
    masks = {
        path.relative_to(recipe.masks).with_suffix(""): path
        for path in list_images(recipe.masks, MASK_SUFFIXES)
    }
    for image in list_images(recipe.images):
        relative = image.relative_to(recipe.images)
        mask = masks.get(relative.with_suffix(""))
        if mask is None and not recipe.unlabelled:
            expected = (recipe.masks / relative).with_suffix(".png")
            raise ValueError(
                f"image {image} has no mask {expected}; add it, remove the image, or take such "
                "images as unlabelled ones: --unlabelled"
            )
        pictures.append(Picture(_key(relative), str(image), mask and str(mask)))
    check_once(pictures, recipe.images)
    if recipe.masks.resolve() != recipe.images.resolve():
        left_out += unused_masks(masks.values(), pictures)
        left_out += passed_over(recipe.masks, MASK_SUFFIXES)
    table, other = read_values(recipe, vocabulary)
    return build_pictures(
        recipe.options.out,
        vocabulary,
        pictures,
        recipe.options,
        read_mask=functools.partial(read_by_table, table=table, other=other),
        labels_only=recipe.labels_only,
        left_out=left_out,
    )


def read_values(recipe: Masks, vocabulary: Vocabulary) -> tuple[dict[int, int], int | None]:
    """Pixel value -> local id, -1 for no label; and the id of all other values, if there is one."""
    ignored = dict.fromkeys(recipe.ignore, -1)
    if recipe.values is None:
        ids = range(len(vocabulary))
        return {recipe.first_value + local: local for local in ids} | ignored, None
    find, where = finder(vocabulary), str(recipe.values)
    named: Mapping[str, str | None] = decode(_Values, read_json(recipe.values), where)
    ids_of = {value: -1 if name is None else find(name, where) for value, name in named.items()}
    other = ids_of.pop("*", None)
    wrong = [value for value in ids_of if not value.isdecimal()]
    require(not wrong, f"{where}: values", wrong, 'whole numbers, or "*" for all others')
    return ignored | {int(value): local for value, local in ids_of.items()}, other


def build_classes(recipe: Classes) -> BuildReport:
    images = [(path, path.relative_to(recipe.root)) for path in list_images(recipe.root)]
    loose = [path for path, relative in images if len(relative.parts) < 2]
    if loose:
        raise ValueError(f"image {loose[0]} is in no class folder; move it into {recipe.root}/NAME")
    names = sorted({relative.parts[0] for _, relative in images})
    folders = sorted(path.name for path in recipe.root.iterdir()
                     if path.is_dir() and not path.name.startswith("."))  # fmt: skip
    left_out = passed_over(recipe.root)
    left_out += [Skipped(name, "a class folder without an image")
                 for name in folders if name not in names]  # fmt: skip
    vocabulary = _vocabulary_of(names, recipe.classes, recipe.uids, recipe.root)
    find = finder(vocabulary)
    pictures = [
        Picture(_key(relative), str(path), labels=(find(relative.parts[0], str(path)),))
        for path, relative in images
    ]
    check_once(pictures, recipe.root)
    return build_pictures(
        recipe.options.out, vocabulary, pictures, recipe.options, left_out=left_out
    )


def build_table(recipe: Table) -> BuildReport:
    rows = read_table(recipe.table)
    names = sorted({label for _, labels in rows for label in labels})
    vocabulary = _vocabulary_of(names, recipe.classes, recipe.uids, recipe.table)
    find = finder(vocabulary)
    pictures = []
    for file, labels in rows:
        path = recipe.images / file
        if not path.is_file():
            raise ValueError(f"{recipe.table}: no image {path}; check --images")
        ids = tuple(sorted({find(label, f"{recipe.table}, {file}") for label in labels}))
        pictures.append(Picture(_key(file), str(path), labels=ids))
    check_once(pictures, recipe.table)
    return build_pictures(recipe.options.out, vocabulary, pictures, recipe.options)


@dataclass(frozen=True)
class _Listed:
    """An image of an index.json; labels, coco80: places in its list of classes."""

    file: str
    split: str | None = None
    labels: tuple[int, ...] | None = None
    coco80: int | None = None
    wnid: str | None = None
    name: str = ""


@dataclass(frozen=True)
class _Index:
    """What is read of an index.json."""

    images: tuple[_Listed, ...] = ()
    classes: tuple[str, ...] = ()
    coco80_classes: tuple[str, ...] = ()
    ignore: int = 255
    proposal: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for image in self.images:
            single = () if image.coco80 is None else (image.coco80,)
            places = single if image.labels is None else image.labels
            self._check(places, f"labels of {image.file!r}")
            is_known = image.labels is not None or single or image.name
            require(is_known, f"name of {image.file!r}", image.name, "given where no label is")
        for name, places in self.proposal.items():
            self._check(places, f"proposal.{name}")

    def _check(self, places: Sequence[int], key: str) -> None:
        count = len(self.names)
        outside = [place for place in places if not 0 <= place < count]
        require(not outside, key, outside[:5], f"places in the list of {count} classes")

    @property
    def names(self) -> tuple[str, ...]:
        return self.classes or self.coco80_classes


def read_index(path: Path) -> _Index:
    """What is known of an index.json, of whatever else it has; ValueError naming the key."""

    def known(kind: type, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {item.name: value[item.name] for item in fields(kind) if item.name in value}

    content = known(_Index, read_json(path))
    if isinstance(content, dict):
        if isinstance(content.get("images"), list):
            content["images"] = [known(_Listed, image) for image in content["images"]]
        if isinstance(content.get("proposal"), dict):  # notes stand beside the groups of classes
            groups = content["proposal"].items()
            content["proposal"] = {name: ids for name, ids in groups if isinstance(ids, list)}
    index = decode(_Index, content, str(path))
    if not index.names or not index.images:
        raise ValueError(f'{path}: needs "classes" (or "coco80_classes") and "images"')
    return index


def build_index_json(recipe: IndexJson) -> BuildReport:
    index = read_index(recipe.index)
    images = [image for image in index.images if recipe.split in (None, image.split)]
    if recipe.listed_classes_only:
        images = [image for image in images if (image.labels, image.coco80) != (None, None)]
    if not images:
        raise ValueError(f"{recipe.index}: no images of split {recipe.split!r}")
    listed = fill_uids([Category(NO_UID, name) for name in index.names], recipe.uids, recipe.index)
    categories = {category.uid: category for category in listed}
    labels = []
    for image in images:
        if image.labels is not None:
            labels.append(tuple(listed[label].uid for label in image.labels))
            continue
        own = _own_category(image) if image.coco80 is None else listed[image.coco80]
        categories.setdefault(own.uid, own)
        labels.append((own.uid,))
    if recipe.shuffle_labels is not None:
        random.Random(recipe.shuffle_labels).shuffle(labels)
    present = {uid for uids in labels for uid in uids}
    kept = [item for item in categories.values() if item.uid in present]
    vocabulary = Vocabulary(
        tuple(kept if recipe.drop_empty_classes else categories.values()), str(recipe.index)
    )
    pictures = [_indexed(recipe, vocabulary, *pair) for pair in zip(images, labels, strict=True)]
    check_once(pictures, recipe.index)
    if recipe.shuffle_labels is not None and any(picture.mask for picture in pictures):
        raise ValueError(f"{recipe.index} has masks, whose labels --shuffle-labels cannot permute; "
                         "add --labels-only")  # fmt: skip
    read_mask = None
    if not recipe.labels_only and any(picture.mask for picture in pictures):
        table = {index.ignore: -1} | {
            value: vocabulary.index(item.uid)
            for value, item in enumerate(listed)
            if item.uid in vocabulary
        }
        read_mask = functools.partial(read_by_table, table=table)
    report = build_pictures(
        recipe.options.out, vocabulary, pictures, recipe.options, read_mask=read_mask
    )
    if index.proposal:  # named groups of classes (base, novel ...) as uids, beside the shards
        groups = {name: [listed[at].uid for at in ids] for name, ids in index.proposal.items()}
        write_atomically(recipe.options.out / "groups.json", json.dumps(groups, indent=1).encode())
    return report


def _indexed(
    recipe: IndexJson, vocabulary: Vocabulary, image: _Listed, uids: Sequence[str]
) -> Picture:
    root = recipe.index.parent
    file = root / "images" / image.file if (root / "images").is_dir() else root / image.file
    if not file.is_file():
        raise ValueError(f"{recipe.index}: no image {file}; add it or list anew")
    mask = root / "masks" / f"{_stem(image.file)}.png"
    ids = tuple(sorted(vocabulary.index(uid) for uid in set(uids)))
    if mask.exists() and not recipe.labels_only:  # its pixels say which classes there are
        return Picture(_key(image.file), str(file), str(mask))
    return Picture(_key(image.file), str(file), labels=ids)


def _own_category(image: _Listed) -> Category:
    """The class of an image outside the class list: its synset with all its names, or its name."""
    name = image.name.replace("_", " ")
    if not image.wnid:
        return Category(name_uid(name), name)
    from timm.data import ImageNetInfo

    lemmas = _imagenet_info(ImageNetInfo).get(image.wnid, "")
    synonyms = [lemma.strip() for lemma in lemmas.split(",") if lemma.strip() not in ("", name)]
    return Category(image.wnid, name, tuple(synonyms))


@functools.cache
def _imagenet_info(info: Any) -> dict[str, str]:
    return dict(info("imagenet-21k-goog").label_descriptions(as_dict=True))


def _vocabulary_of(
    names: Sequence[str], classes: Path | None, uids: Path | None, origin: Path
) -> Vocabulary:
    if classes:
        return read_classes(classes, uids)
    if not names:
        raise ValueError(f"{origin}: no labels in it; name the classes with --classes")
    categories = [Category(name if _is_wnid(name) else NO_UID, name) for name in names]
    return Vocabulary(tuple(fill_uids(categories, uids, origin)))


def _is_wnid(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


_Values: Any = Mapping[str, str | None]
_Labels = str | tuple[str, ...]
_Entries: Any = Mapping[str, _Labels] | tuple[tuple[str, _Labels], ...]


def read_table(path: Path) -> list[tuple[str, list[str]]]:
    """(file, labels) of each image; ValueError naming the line that cannot be read."""
    if path.suffix == ".json":
        entries = decode(_Entries, read_json(path), str(path))
        pairs = entries.items() if isinstance(entries, dict) else entries
        rows = [(file, [labels] if isinstance(labels, str) else [*labels])
                for file, labels in pairs]  # fmt: skip
    else:
        rows = [*_csv_rows(path)]
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(read_text(path).splitlines(), strict=True)
    try:
        for row in reader:
            if not row or (reader.line_num == 1 and row[0] in ("path", "file", "image")):
                continue
            if len(row) != 2:
                raise csv.Error(f"expected path,label;label, found {reprlib.repr(row)}")
            yield row[0], [label.strip() for label in row[1].split(";") if label.strip()]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def read_by_table(path: str, table: Mapping[int, int], other: int | None = None) -> Mask:
    return map_values(read_pixels(path), table, path, other)


def _stem(file: str | Path) -> str:
    return os.path.splitext(file)[0]  # Path.with_suffix refuses what is no name


def _key(file: str | Path) -> str:
    return escape_key(_stem(file))


# ------------------------------------------------------------------------------------ class lists


def read_classes(path: Path, uids: Path | None = None) -> Vocabulary:
    """A class list (see above); ValueError for one that cannot be read."""
    if path.suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict) and "categories" in content:
            return Vocabulary.from_json(content, origin=str(path))
        names = content.get("classes") if isinstance(content, dict) else content
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{path}: expected [names], {{"classes": [names]}} or a vocabulary')
        categories = [Category(NO_UID, name) for name in names]
    else:
        lines = [line.split("\t") for line in read_text(path).splitlines() if line.strip()]
        categories = [_from_columns(line) for line in lines]
    if not categories:
        raise ValueError(f"{path}: no classes in it; write one name a line")
    return Vocabulary(tuple(fill_uids(categories, uids, path)), origin=str(path))


def _from_columns(columns: Sequence[str]) -> Category:
    name, uid, synonyms = (*(column.strip() for column in columns), "", "")[:3]
    others = tuple(text.strip() for text in synonyms.split(",") if text.strip())
    return Category(uid or NO_UID, name, others)


def fill_uids(categories: Sequence[Category], uids: Path | None, origin: Path) -> list[Category]:
    """Fill in uids that are not given, from a vocabulary by name, else from the name."""
    known: dict[str, Category] = {}
    if uids:
        reference = Vocabulary.load(uids).categories
        for item in reference:  # a name of its own goes before another class's synonym
            known.setdefault(fold(item.name), item)
        for item in reference:
            for synonym in item.synonyms:
                known.setdefault(fold(synonym), item)
    filled = []
    for category in categories:
        if category.uid != NO_UID:
            filled.append(category)
        elif (match := known.get(fold(category.name))) is not None:
            names = [name for name in (match.name, *match.synonyms) if name != category.name]
            filled.append(Category(match.uid, category.name, (*category.synonyms, *names)))
        else:
            filled.append(replace(category, uid=name_uid(category.name)))
    seen: dict[str, str] = {}
    for category in filled:
        if category.uid in seen:
            raise ValueError(
                f"{origin}: classes {seen[category.uid]!r} and {category.name!r} both get uid "
                f"{category.uid!r}; give them uids in the class list"
            )
        seen[category.uid] = category.name
    return filled


def name_uid(name: str) -> str:
    """The background's is that of the pseudo labels, so that it is one class with theirs."""
    return BACKGROUND if fold(name) == BACKGROUND else f"name:{fold(name)}"


def finder(vocabulary: Vocabulary) -> Callable[[str, str], int]:
    """find(label, where) -> local id of a name, synonym or uid."""
    known: dict[str, int] = {}
    for spelling in ("uid", "name"):
        for local, category in enumerate(vocabulary.categories):
            known.setdefault(getattr(category, spelling), local)
    for local, category in enumerate(vocabulary.categories):
        for spelled in category.spellings():
            known.setdefault(spelled, local)

    def find(label: str, where: str) -> int:
        local = known.get(label, known.get(fold(label)))
        if local is None:
            raise ValueError(f"{where}: label {label!r} is not in the class list; add it there")
        return local

    return find


if __name__ == "__main__":
    command_line(build, Recipe)
