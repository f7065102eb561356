"""Indexing WebDataset shards that others made: KEY.jpg|png|webp with KEY.cls or KEY.json.

Labels come from `.cls` (an integer) or from `.json`: {"labels": [...]}, {"label": ...},
{"cls": ...}, a list or a single value; each is a local id or a uid of the vocabulary. A
`.mask.png` in our form is used; pickle members are refused; members of other kinds are left alone.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memseg_dist.batch import IGNORE, derive_seed
from memseg_dist.data import files
from memseg_dist.data.decode import (
    IMAGE_FORMATS,
    MASK_EXTENSION,
    PICKLE_EXTENSIONS,
    decode_json,
    decode_mask,
    open_image,
)
from memseg_dist.data.schema import INDEX_NAME, VOCABULARY_NAME, arrow_schema
from memseg_dist.data.vocabulary import Category, Vocabulary


def index_foreign(
    shards: str | Path | Sequence[str | Path],
    vocabulary: Vocabulary | None = None,
    into: str | Path | None = None,
) -> Path:
    """Write `index.parquet` and `vocabulary.json` for tars without one; the index's path.

    shards: a folder or URL that holds `*.tar`, or a list of tars in one folder. into: where to
    write, the shards' own folder by default; an index elsewhere names them by their whole paths.
    Without a vocabulary (nor a `vocabulary.json` there) classes get uids of the folder's name and
    their number.
    """
    root, names = _root_and_names(shards)
    if not names:
        raise ValueError(f"{root}: no {INDEX_NAME} and no *.tar in it; check the path")
    if vocabulary is None and files.exists(files.join(root, VOCABULARY_NAME)):
        vocabulary = Vocabulary.load(files.join(root, VOCABULARY_NAME))
    folder = files.make_folder(root if into is None else into)
    local = files.local_path(root)
    if local is None or folder.resolve() != local.resolve():
        whole = root if local is None else str(local.resolve())
        names = [files.join(whole, name) for name in names]
    path = folder / INDEX_NAME
    temporary = files.temporary_beside(path)
    max_label = -1
    try:
        with pq.ParquetWriter(temporary, arrow_schema(), compression="zstd") as writer:
            for name in names:
                rows = _scan(files.join(root, name), name, vocabulary)
                max_label = max([max_label, *(label for row in rows for label in row["labels"])])
                writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema()))
        if vocabulary is None:
            vocabulary = _numbered(Path(root).name, max_label + 1)
        vocabulary.save(folder / VOCABULARY_NAME)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def index_on_first_use(root: str, cache: Path) -> str:
    """Index `root` into itself if it is a writable folder, else into the cache; the index's path.

    Safe when many processes come at once: one works, the others wait for it.
    """
    local = files.local_path(root)
    if local is not None and not local.is_dir():
        raise ValueError(f"no data set at {root}: there is no such folder; check the path")
    key = f"foreign-{derive_seed(root):016x}"
    writable = local is not None and os.access(local, os.W_OK)
    folder = local if local is not None and writable else cache / key
    with files.locked(cache / f"{key}.lock"):
        path = folder / INDEX_NAME
        return str(path if path.exists() else index_foreign(root, into=folder))


def _root_and_names(shards: str | Path | Sequence[str | Path]) -> tuple[str, list[str]]:
    if not isinstance(shards, (str, Path)):
        paths = sorted(files.check_path(shard) for shard in shards)
        roots = {path.rpartition("/")[0] for path in paths}
        if len(roots) != 1:
            raise ValueError(
                f"shards lie in {len(roots)} folders: {sorted(roots)}; give one folder"
            )
        return roots.pop() or ".", [path.rpartition("/")[2] for path in paths]
    root = files.check_path(shards)
    local = files.local_path(root)
    if local is not None:
        return str(local), sorted(str(path.relative_to(local)) for path in local.rglob("*.tar"))
    filesystem, remote = fsspec.core.url_to_fs(root)
    found = filesystem.glob(f"{remote.rstrip('/')}/*.tar")
    return root, sorted(str(path).rpartition("/")[2] for path in found)


def _numbered(name: str, num_classes: int) -> Vocabulary:
    return Vocabulary(
        tuple(Category(f"{name}/{number}", f"{name} {number}") for number in range(num_classes))
    )


def _scan(path: str, name: str, vocabulary: Vocabulary | None) -> list[dict[str, Any]]:
    rows = []
    with fsspec.open(path, "rb") as stream:
        for key, members in read_members(stream, path):
            try:
                row = index_row(members, vocabulary)
            except ValueError as error:
                raise ValueError(f"shard {path}, sample {key!r}: {error}") from error
            if row is not None:
                rows.append({**row, "key": key, "shard": name})
    if not rows:
        raise ValueError(f"shard {path}: no image member ({sorted(IMAGE_FORMATS)}) in it")
    return rows


Members = dict[str, tuple[int, bytes]]


def read_members(stream: IO[bytes], path: str) -> Iterator[tuple[str, Members]]:
    """(key, extension -> (offset, content)) for each run of members that share a key.

    ValueError, naming the shard, if it is cut short or holds a pickle.
    """
    key, members = "", Members()
    wanted = {*IMAGE_FORMATS, MASK_EXTENSION, "cls", "json"}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension = extension.lower()
                refuse_pickle(member.name, path)
                if not member.isfile() or extension not in wanted:
                    continue
                this = f"{folder}/{stem}" if folder else stem
                if this != key and members:
                    yield key, members
                    members = {}
                key = this
                content = tar.extractfile(member)
                assert content is not None
                members[extension] = (member.offset_data, content.read())
                if len(members[extension][1]) != member.size:
                    raise tarfile.ReadError(f"member {member.name} is incomplete")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"shard {path} is cut short or not a plain tar ({error}); copy or write it again"
        ) from error
    if members:
        yield key, members


def refuse_pickle(member: str, path: str) -> None:
    """ValueError for a member whose name says that reading it would run code."""
    if member.rpartition(".")[2].lower() in PICKLE_EXTENSIONS:
        raise ValueError(
            f"shard {path}: member {member} is a pickle, which can run code when read; refused. "
            "Write the shards without it (images, masks as PNG, labels as JSON)"
        )


def index_row(members: Members, vocabulary: Vocabulary | None) -> dict[str, Any] | None:
    """What the index says of a sample, but for its key and shard; None if it has no image.

    ValueError for a label outside the vocabulary or a mask of another size than the image.
    """
    formats = [extension for extension in members if extension in IMAGE_FORMATS]
    if not formats:
        return None
    labels = {_class_id(value, vocabulary) for value in _labels(members)}
    offset, content = members[formats[0]]
    image_format = "jpg" if formats[0] == "jpeg" else formats[0]
    width, height = open_image(content, image_format).size
    row = {"image_offset": offset, "image_size": len(content), "image_format": image_format}
    row |= {"width": width, "height": height, "mask_offset": 0, "mask_size": 0}
    pixels: dict[int, int] = {}
    if MASK_EXTENSION in members:
        row["mask_offset"], content = members[MASK_EXTENSION]
        row["mask_size"] = len(content)
        mask = decode_mask(content).numpy()
        if mask.shape != (height, width):
            raise ValueError(
                f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels but its image is "
                f"{width} x {height}; write masks at the image's size"
            )
        values, counts = np.unique(mask, return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        pixels.pop(IGNORE, None)
        labels |= {_class_id(value, vocabulary) for value in pixels}
    ordered = sorted(labels)
    counted = [pixels.get(label, 0) for label in ordered] if row["mask_size"] else []
    return {**row, "labels": ordered, "pixels": counted}


def _labels(members: Members) -> list[Any]:
    value: Any = []
    if "json" in members:
        value = decode_json(members["json"][1])
        if isinstance(value, Mapping):
            value = next((value[name] for name in ("labels", "label", "cls") if name in value), [])
    elif "cls" in members:
        value = decode_json(members["cls"][1])
    return value if isinstance(value, list) else [value]


def _class_id(value: Any, vocabulary: Vocabulary | None) -> int:
    if isinstance(value, str) and vocabulary is not None and value in vocabulary:
        return vocabulary.index(value)
    limit = len(vocabulary) if vocabulary is not None else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"label {value!r} is neither a class number nor a known uid")
    if limit is not None and value >= limit:
        raise ValueError(f"label {value} is outside the vocabulary of {limit} classes")
    return value
