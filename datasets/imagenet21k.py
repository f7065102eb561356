"""ImageNet-21K to shards with one image label each.

    python datasets/imagenet21k.py raw --root fall11 --out shards/imagenet21k
    python datasets/imagenet21k.py raw --root fall11 --out shards/imagenet585 --subset imagenet_585
    python datasets/imagenet21k.py raw --root fall11 --out shards/i11k --more-than 500
    python datasets/imagenet21k.py ready --root imagenet-22k-wds     # shards that others made

ROOT of `raw` holds one tar (n01440764.tar) or one folder (n01440764/) per synset. Images go to OUT
itself, mixed across classes, so that any run of shards is a fair draw; each image is read where it
lies, nothing is unpacked. `ready` only writes an index and a vocabulary beside ready-made shards.

Releases (the vocabulary is always whole and in the order of the synset ids, whatever is on disk):
    fall11     21,841 synsets, 14.2 M images, 1.3 TB: timm's "imagenet-22k"
    google     21,843: those and n03931044 (picture) and n09859684 (bleacher), which the weights
               trained at Google have as classes; timm calls it "imagenet-21k-goog"
    winter21   19,167 of fall11's, after the person classes were filtered. No list of them comes
               with a package that we use: the synsets found at ROOT are taken
Of COCO's classes only the teddy bear (n04399382, an ILSVRC class) is a synset outside fall11.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from memseg_dist.data.files import read_text
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.build import BuildReport, Options, ShardTask, build_dataset, command_line
from memseg_dist.tools.external import index_external
from memseg_dist.tools.recipe import (
    IMAGE_SUFFIXES,
    Skipped,
    cut_into_shards,
    files_stamp,
    image_sample,
    no_image,
    read_file,
)
from memseg_dist.tools.shards import Sample, escape_key
from memseg_dist.tools.tar import tar_files

VOCABULARIES = Path(__file__).parent / "vocabularies"
Release = Literal["fall11", "google", "winter21"]
NUM_SYNSETS = {"fall11": 21_841, "google": 21_843, "winter21": 19_167}
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Raw:
    """Per-synset tars or folders to shards."""

    root: Path
    """Folder with n01440764.tar ... or n01440764/ ..."""
    options: Options
    release: Release = "fall11"
    """Which synsets there are: 21,841 (fall11), 21,843 (google) or 19,167 (winter21)."""
    subset: Literal["imagenet_124", "imagenet_585"] | None = None
    """LarvSeg's subsets: the synsets that were matched to classes of ADE20K 150 or 847."""
    wnids: Path | None = None
    """Only the synsets in this text file, one a line."""
    more_than: int = 0
    """Only synsets with more images than this (500 gives LarvSeg's 11,276 of fall11)."""


@dataclass(frozen=True)
class Ready:
    """Index shards in the common form (KEY.jpg with KEY.cls or KEY.json) where they lie."""

    root: Path
    """Folder with *.tar; `.cls` counts the release's synsets in the order of their ids."""
    release: Literal["fall11", "google"] = "fall11"
    """Whose synset ids the shards' labels count."""
    into: Path | None = None
    """Where to write the index, if ROOT is read-only."""


Recipe = (
    Annotated[Raw, tyro.conf.subcommand("raw")] | Annotated[Ready, tyro.conf.subcommand("ready")]
)


@dataclass(frozen=True)
class Listing:
    """Where each image lies. container: row of `paths` (a synset's tar or folder). offset: of its
    content in a tar, -1 in a folder. size: of its content. name: of its file."""

    paths: tuple[str, ...]
    container: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    name: NDArray[np.bytes_]
    label: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.container)

    def take(self, rows: NDArray[np.int64]) -> Listing:
        """These rows, with the paths that they need."""
        used, container = np.unique(self.container[rows], return_inverse=True)
        paths = tuple(self.paths[index] for index in used)
        columns = (self.offset[rows], self.size[rows], self.name[rows], self.label[rows])
        return Listing(paths, container.astype(np.int32), *columns)


def build(recipe: Raw | Ready) -> BuildReport | Path:
    return build_raw(recipe) if isinstance(recipe, Raw) else index_ready(recipe)


def build_raw(recipe: Raw) -> BuildReport:
    found = find_synsets(recipe.root)
    vocabulary = choose_vocabulary(recipe, found)
    listing, left_out = list_images(found, vocabulary)
    if recipe.more_than:
        vocabulary, listing = _frequent(vocabulary, listing, recipe.more_than)
    outside = sorted(set(found) - set(vocabulary.uids))
    absent = len(vocabulary) - len(np.unique(listing.label))
    print(
        f"{recipe.root}: {len(found)} synsets with {len(listing):,} images of {len(vocabulary)} "
        f"classes; {absent} classes have no image, {len(outside)} synsets are no class"
        + (f" ({', '.join(outside[:3])} ...)" if outside else "")
    )
    options = recipe.options
    stamp = files_stamp(listing.paths)  # a folder's tells of new files, not of changed ones
    tasks = _tasks(listing, options)
    return build_dataset(options.out, vocabulary, tasks, options, left_out, stamp)


def index_ready(recipe: Ready) -> Path:
    path = index_external(recipe.root, release_vocabulary(recipe.release), recipe.into)
    print(f"{path}: {len(Index.open(path.parent)):,} images indexed")
    return path


def release_vocabulary(release: Literal["fall11", "google"]) -> Vocabulary:
    """All synsets of a release in the order of their ids; name = first lemma, synonyms = others."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo({"fall11": "imagenet-22k", "google": "imagenet-21k-goog"}[release])
    synsets = sorted(info.label_names())
    assert len(synsets) == NUM_SYNSETS[release], f"timm lists {len(synsets)} for {release}"
    return Vocabulary(
        tuple(_category(wnid, info.label_name_to_description(wnid)) for wnid in synsets),
        origin=f"of ImageNet-21K {release}",
    )


def choose_vocabulary(recipe: Raw, found: dict[str, Path]) -> Vocabulary:
    """The release's classes, or the subset's. ValueError for an unknown synset in a list."""
    if recipe.subset:
        return Vocabulary.load(VOCABULARIES / f"{recipe.subset}.json")
    release = "fall11" if recipe.release == "winter21" else recipe.release
    known = release_vocabulary(release)
    if recipe.release == "winter21":
        kept = tuple(item for item in known.categories if item.uid in found)
        if len(kept) != NUM_SYNSETS["winter21"]:
            print(f"note: {len(kept)} synsets at {recipe.root}; winter21 has 19,167")
        known = Vocabulary(kept, origin="of ImageNet-21K winter21")
    if recipe.wnids:
        listed = _SYNSET.findall(read_text(recipe.wnids))
        if not listed:
            raise ValueError(f"{recipe.wnids}: no synset ids (n01440764) in it")
        unknown = sorted(wnid for wnid in set(listed) if wnid not in known)
        if unknown:
            raise ValueError(
                f"{recipe.wnids}: {unknown[:5]} are no synsets of {recipe.release}; remove them "
                "or try --release google"
            )
        wanted = [known.categories[known.index(wnid)] for wnid in sorted(set(listed))]
        known = Vocabulary(tuple(wanted), origin=str(recipe.wnids))
    return known


def find_synsets(root: Path) -> dict[str, Path]:
    """Synset id -> its tar or folder, by id; ValueError if there is none."""
    if not root.is_dir():
        raise ValueError(f"no folder {root}; check the path")
    found = {}
    for path in sorted(root.iterdir()):
        if _SYNSET.fullmatch(path.stem) and (path.suffix == ".tar" or path.is_dir()):
            found[path.stem] = path
    if not found:
        raise ValueError(f"{root}: no n01440764.tar ... and no n01440764/ ... in it")
    return found


def list_images(found: dict[str, Path], vocabulary: Vocabulary) -> tuple[Listing, list[Skipped]]:
    """All images of the vocabulary's synsets, of which only headers and folder entries are read,
    and their other files.
    """
    wanted = {wnid: path for wnid, path in found.items() if wnid in vocabulary}
    with ThreadPoolExecutor(16) as pool:
        listed = list(pool.map(_list_one, wanted.values()))
    parts = [images for images, _ in listed]
    counts = [len(part) for part in parts]
    rows = [row for part in parts for row in part]
    if not rows:
        raise ValueError(f"no images of the {len(vocabulary)} wanted classes were found")
    labels = [vocabulary.index(wnid) for wnid in wanted]
    listing = Listing(
        paths=tuple(str(path) for path in wanted.values()),
        container=np.repeat(np.arange(len(wanted), dtype=np.int32), counts),
        offset=np.array([row[0] for row in rows], np.int64),
        size=np.array([row[1] for row in rows], np.int64),
        name=np.array([row[2] for row in rows], np.bytes_),
        label=np.repeat(np.array(labels, np.int32), counts),
    )
    return listing, [file for _, others in listed for file in others]


def _list_one(path: Path) -> tuple[list[tuple[int, int, bytes]], list[Skipped]]:
    if path.is_dir():
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        files = [(-1, file.stat().st_size, file.name) for file in entries if file.is_file()]
    else:
        with open(path, "rb") as stream:
            files = [(file.offset_data, file.size, file.name) for file in tar_files(stream, path)]
    images = [(offset, size, os.fsencode(name)) for offset, size, name in files if _is_image(name)]
    others = [no_image(Path(path.stem, name)) for *_, name in files if not _is_image(name)]
    return images, others


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _frequent(
    vocabulary: Vocabulary, listing: Listing, more_than: int
) -> tuple[Vocabulary, Listing]:
    counts = np.bincount(listing.label, minlength=len(vocabulary))
    kept = np.flatnonzero(counts > more_than)
    if not len(kept):
        raise ValueError(f"no synset has more than {more_than} images; the most is {counts.max()}")
    new_label = np.full(len(vocabulary), -1, np.int32)
    new_label[kept] = np.arange(len(kept))
    rows = np.flatnonzero(new_label[listing.label] >= 0)
    listing = listing.take(rows)
    listing = Listing(**{**vars(listing), "label": new_label[listing.label]})
    return Vocabulary(tuple(vocabulary.categories[index] for index in kept)), listing


def _tasks(listing: Listing, options: Options) -> list[ShardTask]:
    chunks = cut_into_shards(
        range(len(listing)),
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.megabytes_per_shard * 2**20,
        num_bytes=listing.size.tolist().__getitem__,
        shuffle_seed=options.shuffle_seed,
        limit=options.limit,
    )
    return [ShardTask(samples, listing.take(np.array(chunk))) for chunk in chunks]


def samples(listing: Listing) -> Iterator[Sample | Skipped]:
    columns = (listing.container, listing.offset, listing.size, listing.name, listing.label)
    for container, offset, size, raw_name, label in zip(*columns, strict=True):
        path, name = Path(listing.paths[container]), os.fsdecode(raw_name)
        content = read_file(path / name) if offset < 0 else read_file(path, int(offset), int(size))
        stem = Path(name).stem
        key = stem if stem.startswith(path.stem) else f"{path.stem}/{stem}"
        yield image_sample(escape_key(key), content, [int(label)])


def _category(wnid: str, lemmas: str) -> Category:
    name, *synonyms = [lemma.strip() for lemma in lemmas.split(",")]
    return Category(wnid, name, tuple(synonyms))


if __name__ == "__main__":
    command_line(build, Recipe)
