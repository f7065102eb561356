"""What the recipes in `datasets/` share: pictures on disk to Samples, lists of them to shards.

A recipe lists `Picture`s cheaply (no pixel is read), `cut_into_shards` deals them out, and
`picture_samples` opens them inside the task that writes the shard.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from memseg_dist.batch import derive_seed
from memseg_dist.data.decode import (
    MASK_IGNORE,
    CorruptSample,
    check_whole,
    load_pixels,
    open_image,
)
from memseg_dist.data.files import read_text
from memseg_dist.tools.shards import Sample

Mask = NDArray[np.uint16]
ReadMask = Callable[[str], Mask]
ReadImage = Callable[[str], bytes]
T = TypeVar("T")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, NotImplementedError, zlib.error)
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


@dataclass(frozen=True)
class Picture:
    """One image file, and its mask file where it has one."""

    key: str
    image: str
    mask: str | None = None
    labels: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A sample, file or folder that was left out, and why."""

    key: str
    reason: str


def picture_samples(
    pictures: Sequence[Picture],
    read_mask: ReadMask | None = None,
    labels_only: bool = False,
    read_image: ReadImage | None = None,
) -> Iterator[Sample | Skipped]:
    """The pictures as Samples, one at a time.

    read_image: the image file to store; by default as it is. labels_only: the classes of the mask
    become image labels and the mask itself is dropped.
    """
    for picture in pictures:
        content = (read_image or read_file)(picture.image)
        mask = read_mask(picture.mask) if read_mask and picture.mask else None
        labels = picture.labels
        if mask is not None and labels_only:
            labels = (*labels, *_classes(mask))
            mask = None
        yield image_sample(picture.key, content, labels, mask, picture.extra)


def read_file(path: str | Path, offset: int = 0, size: int = -1) -> bytes:
    """The file's bytes, or a part of them; ValueError naming the path if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            content = stream.read(size)
    except OSError as error:
        raise ValueError(
            f"image {path} cannot be read ({error}); restore it or list anew"
        ) from error
    if len(content) < size:
        raise ValueError(f"image {path} at byte {offset}: {len(content)} of {size} bytes are there")
    return content


def image_sample(
    key: str,
    content: bytes,
    labels: Sequence[int],
    mask: Mask | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Sample | Skipped:
    """A Sample whose format is read from its first bytes; Skipped if it is not a known image, or
    one that is cut short.
    """
    image_format = sniff_format(content)
    if image_format is None:
        return Skipped(key, "not a JPEG, PNG or WebP image")
    try:
        open_image(content, image_format)
        check_whole(content, image_format)
    except CorruptSample as error:
        return Skipped(key, str(error))
    unique = tuple(sorted(set(labels)))
    return Sample(key, content, image_format, unique, mask, dict(extra or {}))


def sniff_format(content: bytes) -> str | None:
    for magic, image_format in _MAGIC.items():
        if content.startswith(magic):
            return image_format
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def read_pixels(path: str) -> NDArray[np.int32]:
    """A PNG's raw values [H, W], or [H, W, C] of a colour image; palette images by index."""
    try:
        return load_pixels(open_image(Path(path).read_bytes(), "png")).astype(np.int32)
    except (OSError, CorruptSample) as error:
        raise ValueError(f"mask {path}: cannot be read ({error}); restore the file") from error


def read_matlab(path: str, fields: Sequence[str], instead: str) -> NDArray[np.int64]:
    """int64 [H, W]: the label map of a MATLAB file, at `fields`, each a field of the one before.

    ValueError naming the path if the file has none, or if scipy is not installed; `instead` tells
    the user what to do without scipy.
    """
    try:
        from scipy.io.matlab import MatReadError, loadmat
    except ImportError as error:
        raise ValueError(
            f"mask {path} is a MATLAB file, which scipy reads: pip install scipy, or {instead}"
        ) from error
    try:
        value = loadmat(path)[fields[0]]
        for name in fields[1:]:
            value = value[name][0, 0]
        return value.astype(np.int64)
    except (*_UNREADABLE, MatReadError) as error:
        raise ValueError(
            f"mask {path} has no label map {'.'.join(fields)} ({error!r}); restore the file"
        ) from error


def map_values(
    values: NDArray[np.integer], table: Mapping[int, int], path: str, other: int | None = None
) -> Mask:
    """Raw values -> local ids by `table` (id -1 = unknown); those it does not have -> `other`.

    ValueError naming the path for a value that the table does not have, without `other`.
    """
    if values.ndim != 2:
        raise ValueError(
            f"mask {path}: expected one value per pixel, found shape {list(values.shape)}; "
            "write label maps as grey or palette images"
        )
    present = np.unique(values)
    unknown = [int(value) for value in present if int(value) not in table]
    if unknown and other is None:
        raise ValueError(
            f"mask {path}: value(s) {unknown[:8]} are no class of this data set; check the class "
            "list and the value that means 'ignore'"
        )
    local = np.array([table.get(int(value), other) for value in present])
    local = np.where(local < 0, MASK_IGNORE, local).astype(np.uint16)
    return local[np.searchsorted(present, values)]


def _classes(mask: Mask) -> list[int]:
    return [int(value) for value in np.unique(mask) if value != MASK_IGNORE]


def read_names(path: Path, fix: str) -> list[str]:
    """The names in a list of images, one a line; ValueError ending in `fix` if there is no file."""
    if not path.is_file():
        raise ValueError(f"no list of images {path}; {fix}")
    return read_text(path).split()


def counted(num_images: int, full: int) -> str:
    """Such as "3 images, NOT the 500 of the full data set"."""
    text = f"{num_images:,} images"
    return text if num_images == full else f"{text}, NOT the {full:,} of the full data set"


def list_images(folder: str | Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """All image files below `folder`, sorted; ValueError if there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"no folder {root}; check the path")
    found = [path for path in _files(root) if _why_not(path, root, suffixes) is None]
    if not found:
        raise ValueError(f"no images ({', '.join(suffixes)}) below {root}; check the path")
    return sorted(found)


def passed_over(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Skipped]:
    """The files below `folder` that `list_images` leaves out, but hidden ones of other kinds."""
    reasons = {path: _why_not(path, folder, suffixes) for path in sorted(_files(folder))}
    return [Skipped(str(path.relative_to(folder)), why) for path, why in reasons.items() if why]


def unused_masks(masks: Iterable[Path], pictures: Iterable[Picture]) -> list[Skipped]:
    """Those of the masks that no picture has."""
    used = {picture.mask for picture in pictures}
    unused = sorted(path for path in masks if str(path) not in used)
    return [Skipped(str(path), "a mask without an image") for path in unused]


def _files(root: Path) -> Iterator[Path]:
    return (Path(path) / name for path, _, names in os.walk(root) for name in names)


def _why_not(path: Path, root: Path, suffixes: Sequence[str]) -> str | None:
    """Why `list_images` leaves the file out, "" if nobody cares to know; None if it does not."""
    name = path.relative_to(root)
    is_hidden = any(part.startswith(".") for part in name.parts)
    if not name.name.lower().endswith(tuple(suffixes)):
        return "" if is_hidden else no_image(name, suffixes).reason
    if is_hidden:
        return "hidden"
    return None if path.exists() else "a link to a file that is not there"


def no_image(name: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Skipped:
    """What is said of a file that is no image by its name."""
    return Skipped(str(name), f"{name.suffix or name.name}: none of {', '.join(suffixes)}")


def cut_into_shards(
    items: Sequence[T],
    *,
    samples_per_shard: int,
    bytes_per_shard: int,
    num_bytes: Callable[[T], int],
    shuffle_seed: int | None,
    limit: int | None = None,
) -> list[tuple[T, ...]]:
    """Deal items out to shards of at most so many samples and (above one sample) bytes.

    shuffle_seed: permute first, so that every shard is a fair draw of the data set and `limit`
    takes a random subset; None keeps the order.
    """
    if samples_per_shard < 1 or bytes_per_shard < 1:
        raise ValueError(
            f"{samples_per_shard} samples and {bytes_per_shard} bytes per shard: both must be "
            "at least 1"
        )
    order = shuffled(len(items), shuffle_seed)[:limit]
    shards: list[tuple[T, ...]] = []
    current: list[T] = []
    total = 0
    for position in order:
        item = items[int(position)]
        size = num_bytes(item)
        if current and (len(current) == samples_per_shard or total + size > bytes_per_shard):
            shards.append(tuple(current))
            current, total = [], 0
        current.append(item)
        total += size
    return [*shards, tuple(current)] if current else shards


def shuffled(count: int, seed: int | None) -> NDArray[np.int64]:
    """0 .. count - 1, permuted by `seed` (the same on every machine); in order for None."""
    if seed is None:
        return np.arange(count)
    return np.random.Generator(np.random.PCG64(derive_seed("shards", seed))).permutation(count)


def picture_files(picture: Picture) -> list[str]:
    return [picture.image, picture.mask] if picture.mask else [picture.image]


def picture_bytes(picture: Picture) -> int:
    """Size of a picture's files on disk."""
    return sum(map(os.path.getsize, picture_files(picture)))


def files_stamp(paths: Iterable[str]) -> str:
    """What changes when one of the files does, by their sizes and times."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        known = os.stat(path)
        digest.update(f"{known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()
