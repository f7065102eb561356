"""Indexing WebDataset shards that others made: KEY.jpg|png|webp with KEY.cls or KEY.json.

Labels come from `.cls` (an integer) or from `.json`: {"labels": [...]}, {"label": ...},
{"cls": ...}, a list or a single value; each is a local id or a uid of the vocabulary. A
`.mask.png` in our form is used; pickle members are refused; members of other kinds are left alone.
A sample whose image or mask cannot be read is indexed as one of 0 x 0 pixels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memseg_dist.data import files
from memseg_dist.data.decode import (
    IMAGE_FORMATS,
    MASK_EXTENSION,
    MASK_IGNORE,
    PICKLE_EXTENSIONS,
    CorruptSample,
    decode_mask,
    open_image,
)
from memseg_dist.data.index import external_index_folder
from memseg_dist.data.schema import INDEX_NAME, MAX_MEMBER_BYTES, VOCABULARY_NAME, arrow_schema
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.jsonable import parse, shown
from memseg_dist.tools.shards import check_keys, sample_row, write_parquet
from memseg_dist.tools.tar import tar_files

log = logging.getLogger(__name__)
_MAX_BYTES = {
    **dict.fromkeys((*IMAGE_FORMATS, MASK_EXTENSION), MAX_MEMBER_BYTES),
    **dict.fromkeys(("cls", "json"), 16 << 20),
}
"""Kinds of members that are read, and how large they may be."""


def index_external(
    shards: str | Path,
    vocabulary: Vocabulary | None = None,
    into: str | Path | None = None,
) -> Path:
    """Write `index.parquet` and `vocabulary.json` for tars without one; the index's path.

    shards: a folder or URL that holds `*.tar`. into: where to write, the shards' own folder by
    default; an index elsewhere names them by their whole paths.
    Without a vocabulary (nor a `vocabulary.json` there) classes get uids of the folder's name and
    their number.
    """
    root = files.check_path(shards)
    names = _shard_names(root)
    if not names:
        raise ValueError(f"{root}: no {INDEX_NAME} and no *.tar in it; check the path")
    if vocabulary is None and files.exists(files.join(root, VOCABULARY_NAME)):
        vocabulary = Vocabulary.load(files.join(root, VOCABULARY_NAME))
    folder = files.make_folder(root if into is None else into)
    local = files.local_path(root)
    if local is None or folder.resolve() != local.resolve():
        whole = root if local is None else str(local.resolve())
        names = [files.join(whole, name) for name in names]
    highest, keys = -1, list[pa.Array]()
    unreadable, without_image = list[str](), list[str]()

    def tables() -> Iterator[pa.Table]:
        nonlocal highest
        for name in names:
            table, problems, imageless = _scan(files.join(root, name), name, vocabulary)
            highest = max([highest, *pc.list_flatten(table["labels"]).to_pylist()])
            keys.extend(table["key"].chunks)
            unreadable.extend(problems)
            without_image.extend(imageless)
            yield table
        check_keys(keys, root)
        named = vocabulary or _numbered(Path(root).name, highest + 1)
        named.save(folder / VOCABULARY_NAME)  # before the index, whose presence says: all is there

    write_parquet(folder / INDEX_NAME, tables())
    if unreadable:
        log.warning(
            "%s: %d samples cannot be read, and sources skip or refuse them as their on_corrupt "
            "says; the first is %s", root, len(unreadable), unreadable[0],
        )  # fmt: skip
    if without_image:
        log.warning(
            "%s: %d keys have labels or a mask but no image (%s), and are left out; the first is "
            "%s", root, len(without_image), ", ".join(sorted(IMAGE_FORMATS)), without_image[0],
        )  # fmt: skip
    return folder / INDEX_NAME


def ensure_indexed(paths: Iterable[str | Path], cache_dir: str | Path | None = None) -> None:
    """Index those of the folders or URLs `paths` that hold shards of others and no index yet.

    The index goes into the folder if that can be written to, else into the cache, where
    `Index.open` looks for it. Safe when many processes come at once: one works, the others wait.
    ValueError for a path that is no data set, or a shard that cannot be used.
    """
    cache = files.make_folder(Path(cache_dir or files.default_cache()) / "index")
    for path in paths:
        root = files.absolute(path)
        if files.exists(files.join(root, INDEX_NAME)):
            continue
        local = files.local_path(root)
        if local is not None and not local.is_dir():
            raise ValueError(f"no data set at {root}: there is no such folder; check the path")
        in_cache = external_index_folder(root, cache)
        writable = local is not None and os.access(local, os.W_OK)
        folder = local if local is not None and writable else in_cache
        with files.locked(in_cache.with_suffix(".lock")):
            if not (folder / INDEX_NAME).exists():
                index_external(root, into=folder)


def _shard_names(root: str) -> list[str]:
    """Of all tars below a local folder, or directly in a remote one."""
    local = files.local_path(root)
    if local is not None:
        return sorted(str(path.relative_to(local)) for path in local.rglob("*.tar"))
    return files.glob(root, "*.tar")


def _numbered(name: str, num_classes: int) -> Vocabulary:
    return Vocabulary(
        tuple(Category(f"{name}/{number}", f"{name} {number}") for number in range(num_classes))
    )


def _scan(
    path: str, name: str, vocabulary: Vocabulary | None
) -> tuple[pa.Table, list[str], list[str]]:
    """The rows of a shard, what is wrong with those samples that cannot be read, and where keys
    are without an image.
    """
    rows, unreadable, without_image = [], [], []
    with files.open_binary(path) as stream:
        for key, members in read_members(stream, path):
            where = f"shard {path}, sample {key!r}"
            try:
                try:
                    row = index_row(members, vocabulary)
                except CorruptSample as error:
                    unreadable.append(f"{where}: {error}")
                    row = index_row(members, vocabulary, is_readable=False)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if row is None:
                without_image.append(where)
            else:
                rows.append({**row, "key": key, "shard": name})
    if not rows:
        raise ValueError(f"shard {path}: no image member ({sorted(IMAGE_FORMATS)}) in it")
    return pa.Table.from_pylist(rows, schema=arrow_schema()), unreadable, without_image


Members = dict[str, tuple[int, bytes]]


def read_members(stream: IO[bytes], path: str) -> Iterator[tuple[str, Members]]:
    """(key, extension -> (offset, content)) for each run of members that share a key.

    ValueError, naming the shard, if it is damaged or cut short or holds a pickle.
    """
    key, members = "", Members()
    for file in tar_files(stream, f"shard {path}"):
        folder, _, base = file.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if extension.rpartition(".")[2] in PICKLE_EXTENSIONS:
            raise ValueError(
                f"shard {path}: member {file.name} is a pickle, which can run code when read; "
                "refused. Write the shards without it (images, masks as PNG, labels as JSON)"
            )
        if extension not in _MAX_BYTES:
            continue
        if file.size > _MAX_BYTES[extension]:
            raise ValueError(
                f"shard {path}: member {file.name} has {file.size:,} bytes, more than the "
                f"{_MAX_BYTES[extension]:,} that a .{extension} may have; leave it out"
            )
        this = f"{folder}/{stem}" if folder else stem
        if this != key and members:
            yield key, members
            members = {}
        key = this
        stream.seek(file.offset_data)
        if extension in members:
            raise ValueError(f"shard {path}: member {file.name} is there twice; leave one out")
        members[extension] = (file.offset_data, stream.read(file.size))
    if members:
        yield key, members


def index_row(
    members: Members, vocabulary: Vocabulary | None, is_readable: bool = True
) -> dict[str, Any] | None:
    """What the index says of a sample, but for its key and shard; None if it has no image.

    is_readable: whether to look at the pixels; else the sample counts as one of 0 x 0.
    ValueError for labels that cannot be read or lie outside the vocabulary, CorruptSample for an
    image or a mask that cannot be used.
    """
    image_format = next((extension for extension in members if extension in IMAGE_FORMATS), None)
    if image_format is None:
        return None
    labels = [_class_id(value, vocabulary) for value in _labels(members)]
    offset, image = members[image_format]
    places = {"image_offset": offset, "image_size": len(image)}
    size, mask = (0, 0), None
    if MASK_EXTENSION in members:
        offset, content = members[MASK_EXTENSION]
        places |= {"mask_offset": offset, "mask_size": len(content)}
        if is_readable:
            mask = decode_mask(content).numpy().astype(np.uint16)  # IGNORE is MASK_IGNORE again
    if is_readable:
        size = open_image(image, image_format).size
    num_classes = MASK_IGNORE if vocabulary is None else len(vocabulary)
    return sample_row(size, image_format, mask, labels, num_classes) | places


def _labels(members: Members) -> list[Any]:
    value: Any = []
    if "json" in members:
        value = parse(members["json"][1], "its .json")
        if isinstance(value, Mapping):
            value = next((value[name] for name in ("labels", "label", "cls") if name in value), [])
    elif "cls" in members:
        value = parse(members["cls"][1], "its .cls")
    return value if isinstance(value, list) else [value]


def _class_id(value: Any, vocabulary: Vocabulary | None) -> int:
    if isinstance(value, str) and vocabulary is not None and value in vocabulary:
        return vocabulary.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"label {shown(value)} is neither a class number nor a known uid")
    return value
