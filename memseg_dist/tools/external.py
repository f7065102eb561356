"""Indexing WebDataset shards that others made: KEY.jpg|png|webp with KEY.cls or KEY.json.

Labels come from `.cls` (an integer) or from `.json`: {"labels": [...]}, {"label": ...},
{"cls": ...}, a list or a single value; each is a local id or a uid of the `vocabulary.json` that
must lie beside the tars. A `.mask.png` in our form is used; pickle members are refused; members of
other kinds are left alone. A sample whose image or mask cannot be read is indexed as one of 0 x 0
pixels. A key with white space, '.' or '\\' is escaped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from memseg_dist.data import files
from memseg_dist.data.decode import (
    IMAGE_FORMATS,
    MASK_EXTENSION,
    PICKLE_EXTENSIONS,
    CorruptSample,
    decode_mask,
    open_image,
)
from memseg_dist.data.index import Index, external_index_folder
from memseg_dist.data.schema import INDEX_NAME, MAX_MEMBER_BYTES, VOCABULARY_NAME, arrow_schema
from memseg_dist.data.vocabulary import VOCABULARY_FORMAT, Vocabulary
from memseg_dist.jsonable import parse, shown
from memseg_dist.tools.shards import as_key, check_keys, sample_row, write_parquet
from memseg_dist.tools.tar import tar_files

log = logging.getLogger(__name__)
_MAX_BYTES = {
    **dict.fromkeys((*IMAGE_FORMATS, MASK_EXTENSION), MAX_MEMBER_BYTES),
    **dict.fromkeys(("cls", "json"), 16 << 20),
}
"""Kinds of members that are read, and how large they may be."""
_EXAMPLE = (
    f'{{"format": {VOCABULARY_FORMAT}, "categories": [{{"uid": "name:cat", "name": "cat"}}, ...]}}'
)


def index_external(
    shards: str | Path,
    vocabulary: Vocabulary | None = None,
    into: str | Path | None = None,
) -> Path:
    """Write `index.parquet` and `vocabulary.json` for tars without one; the index's path.

    shards: a folder or URL that holds `*.tar`. into: where to write, the shards' own folder by
    default; an index elsewhere names them by their whole paths.
    ValueError for labels or masks without a vocabulary (nor a `vocabulary.json` there).
    """
    root = files.data_root(shards)
    names = _shard_names(root)
    if not names:
        raise ValueError(f"{root}: no {INDEX_NAME} and no *.tar in it; check the path")
    path = files.join(root, VOCABULARY_NAME)
    if vocabulary is None:
        vocabulary = Vocabulary.load(path) if files.exists(path) else Vocabulary(())
    folder = files.make_folder(root if into is None else into)
    local = files.local_path(root)
    if local is None or folder.resolve() != local.resolve():
        whole = root if local is None else str(local.resolve())
        names = [files.join(whole, name) for name in names]
    keys, unreadable, without_image = list[pa.Array](), list[str](), list[str]()

    def tables() -> Iterator[pa.Table]:
        for name in names:
            table, problems, imageless = _scan(files.join(root, name), name, vocabulary)
            keys.extend(table["key"].chunks)
            unreadable.extend(problems)
            without_image.extend(imageless)
            yield table
        check_keys(keys, root)
        vocabulary.save(folder / VOCABULARY_NAME)  # before the index, which says that all is there

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
        root = files.data_root(path)
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


def unindexed(index: Index) -> list[str]:
    """The tars at the index's root that it does not list, as in folders below without an index of
    their own; [] where folders cannot be listed, as over https.
    """
    try:
        paths = [files.join(index.root, name) for name in _shard_names(index.root)]
    except ValueError:
        return []
    listed = {files.join(index.root, name) for name in index.shard_names}
    missing = [path for path in paths if path not in listed]
    return [path for path in missing if not _has_own_index(path, index.root)]


def _has_own_index(path: str, root: str) -> bool:
    folder = path.rpartition("/")[0]
    return folder != root.rstrip("/") and files.exists(files.join(folder, INDEX_NAME))


def _shard_names(root: str) -> list[str]:
    """Of all tars below a local folder, or directly in a remote one."""
    local = files.local_path(root)
    if local is not None:
        return sorted(str(path.relative_to(local)) for path in local.rglob("*.tar"))
    return files.glob(root, "*.tar")


def _scan(path: str, name: str, vocabulary: Vocabulary) -> tuple[pa.Table, list[str], list[str]]:
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
    """(key, extension -> (offset, content)) for each run of members that share a key, which is
    their name without a first "./", escaped if need be.

    ValueError, naming the shard, if it is damaged or cut short or holds a pickle.
    """
    key, members = "", Members()
    for file in tar_files(stream, f"shard {path}"):
        folder, _, base = file.name.removeprefix("./").rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if extension.rpartition(".")[2] in PICKLE_EXTENSIONS:
            raise ValueError(
                f"shard {path}: member {file.name} is a pickle, which can run code when read; "
                "refused. Write the shards without it (images, masks as PNG, labels as JSON)"
            )
        if not stem or extension not in _MAX_BYTES:
            continue
        if file.size > _MAX_BYTES[extension]:
            raise ValueError(
                f"shard {path}: member {file.name} has {file.size:,} bytes, more than the "
                f"{_MAX_BYTES[extension]:,} that a .{extension} may have; leave it out"
            )
        this = as_key(f"{folder}/{stem}" if folder else stem)
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
    members: Members, vocabulary: Vocabulary, is_readable: bool = True
) -> dict[str, Any] | None:
    """What the index says of a sample, but for its key and shard; None if it has no image.

    is_readable: whether to look at the pixels; else the sample counts as one of 0 x 0.
    ValueError for labels that cannot be read or lie outside the vocabulary, CorruptSample for an
    image or a mask that cannot be used.
    """
    image_format = next((extension for extension in members if extension in IMAGE_FORMATS), None)
    if image_format is None:
        return None
    values = _labels(members)
    if not len(vocabulary) and (values or MASK_EXTENSION in members):
        raise ValueError(
            f"it has labels or a mask, but no {VOCABULARY_NAME} says which classes they are; write "
            f"one beside the shards, with the classes in the order of their numbers: {_EXAMPLE}"
        )
    labels = [_class_id(value, vocabulary) for value in values]
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
    return sample_row(size, image_format, mask, labels, len(vocabulary)) | places


def _labels(members: Members) -> list[Any]:
    value: Any = []
    if "json" in members:
        value = parse(members["json"][1], "its .json")
        if isinstance(value, Mapping):
            value = next((value[name] for name in ("labels", "label", "cls") if name in value), [])
    elif "cls" in members:
        value = parse(members["cls"][1], "its .cls")
    return value if isinstance(value, list) else [value]


def _class_id(value: Any, vocabulary: Vocabulary) -> int:
    if isinstance(value, str) and value in vocabulary:
        return vocabulary.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"label {shown(value)} is neither a class number nor a known uid")
    return value
