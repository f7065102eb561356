"""Segment pictures that are not part of a data set, and write what was found.

Per picture NAME (its file's; with the sub-folders of a folder that was named): NAME.labels.png
(16-bit grey, value = label-space id), NAME.overlay.png (with a legend) and NAME.json (the classes
found and their areas, the largest first).

Shape letters: H x W pixels of the picture as stored, K classes asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memseg_dist.data.decode import decode_image, encode_mask
from memseg_dist.data.files import is_url, make_folder, public, read_bytes, unwritable
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.evaluation.sliding import Inference, segment_batch
from memseg_dist.methods.method import Method, evaluation_mode
from memseg_dist.tools.pictures.panels import overlay
from memseg_dist.tools.recipe import Skipped, list_images, passed_over, sniff_format

LARGEST_ID = 65534


def read_image(path: str | Path) -> Tensor:
    """uint8 [3, H, W] of a local file or URL; ValueError naming it if it is no image we read."""
    content = read_bytes(path)
    image_format = sniff_format(content)
    if image_format is None:
        raise ValueError(f"{path} is not a JPEG, PNG or WebP image; convert it to one")
    try:
        return decode_image(content, image_format)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_pictures(named: Sequence[str]) -> tuple[dict[str, str], list[Skipped]]:
    """The pictures that files, URLs, folders and patterns (`photos/*.jpg`) name: where each is, by
    the name of what is written of it, which for a folder's is its path inside; and the folders'
    other files. ValueError for a pattern without a picture, and for two of one name.
    """
    found: dict[str, str] = {}
    other: list[Skipped] = []
    inside: list[tuple[Path, Path | str]]
    for text in named:
        path = Path(public(text))
        if not is_url(text) and path.is_dir():
            inside = [(item.relative_to(path).with_suffix(""), item) for item in list_images(path)]
            other += passed_over(path)
        elif not is_url(text) and has_magic(text) and not path.exists():
            matches = sorted(map(Path, glob(text, recursive=True)))
            inside = [(Path(item.stem), item) for item in matches if item.is_file()]
            if not inside:
                raise ValueError(f"no file is named like {text}; check the pattern")
        else:
            inside = [(Path(path.stem), text)]
        for name, picture in ((str(name), str(picture)) for name, picture in inside):
            if found.setdefault(name, picture) != picture:
                raise ValueError(
                    f"{found[name]} and {picture} would be written to the same files; use two "
                    "folders for --out"
                )
    return found, other


def fitted_batches(
    pictures: Iterable[tuple[str, Tensor]], inference: Inference, size: int
) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """(name, image, fitted image) of up to `size` pictures in a row whose fitted sizes agree."""
    batch: list[tuple[str, Tensor, Tensor]] = []
    for name, image in pictures:
        fitted = inference.fitted(image)
        if batch and (len(batch) == size or batch[0][2].shape != fitted.shape):
            yield batch
            batch = []
        batch.append((name, image, fitted))
    if batch:
        yield batch


def predict_images(
    method: Method,
    fitted: Sequence[Tensor],
    class_ids: Sequence[int],
    inference: Inference,
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
) -> list[Tensor]:
    """Fitted images uint8 [3, Y, X] of one size -> int64 [H, W], of `sizes`, of the best of
    `class_ids` [K] per pixel, on the host.
    """
    ids = torch.tensor(class_ids, device=device)
    with evaluation_mode(method):
        images = torch.stack([*fitted]).to(device)
        found = segment_batch(method.predict, images, ids, inference, sizes)
    return [ids[index].cpu() for index in found]


def write_prediction(
    folder: str | Path,
    name: str,
    path: str | Path,
    image: Tensor,
    label_map: Tensor,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Write the three files of the picture `path`; returns what is in the JSON file.

    name: that of the files, with sub-folders. image: uint8 [3, H, W]; label_map: int64 [H, W] of
    label-space ids. ValueError if the folder cannot be written to or an id does not fit 16 bits.
    """
    if int(label_map.max()) > LARGEST_ID:
        raise ValueError(
            f"class id {int(label_map.max())} does not fit a 16-bit label map; ask for fewer "
            "classes of a smaller label space"
        )
    root, name = make_folder((Path(folder) / name).parent), Path(name).name
    ids, counts = label_map.unique(return_counts=True)
    areas = sorted(zip(ids.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
    uids, names, labels = vocabulary.uids, vocabulary.names, label_map.numpy()
    keys = ("id", "uid", "name", "pixels", "share")
    rows = [(i, uids[i], names[i], pixels, pixels / labels.size) for i, pixels in areas]
    report = {
        "image": public(path),
        "width": labels.shape[1],
        "height": labels.shape[0],
        "labels": f"{name}.labels.png",
        "overlay": f"{name}.overlay.png",
        "classes": [dict(zip(keys, row, strict=True)) for row in rows],
    }
    picture = overlay(image.permute(1, 2, 0).numpy(), labels, names)
    try:
        (root / f"{name}.labels.png").write_bytes(encode_mask(labels.astype(np.uint16)))
        picture.save(root / f"{name}.overlay.png")
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (root / f"{name}.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(root / name, error) from error
    return report
