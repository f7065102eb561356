"""Segment pictures that are not part of a data set, and write what was found.

Per picture NAME: NAME.labels.png (16-bit grey, value = label-space id), NAME.overlay.png (with a
legend) and NAME.json (the classes found and their areas, the largest first).

Shape letters: H x W pixels of the picture as stored, K classes asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memseg_dist.data.decode import decode_image, encode_mask
from memseg_dist.data.files import make_folder, read_bytes, unwritable
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.evaluation.sliding import Inference, segment
from memseg_dist.methods.method import Method, evaluation_mode
from memseg_dist.tools.pictures.panels import overlay
from memseg_dist.tools.recipe import sniff_format

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


def predict_image(
    method: Method,
    image: Tensor,
    class_ids: Sequence[int],
    inference: Inference,
    device: torch.device,
) -> Tensor:
    """uint8 [3, H, W] -> int64 [H, W] of the best of `class_ids` [K] per pixel, on the host."""
    ids = torch.tensor(class_ids, device=device)
    height, width = image.shape[-2:]
    small = inference.fitted(image).to(device)
    with evaluation_mode(method):
        index = segment(method.predict, small, ids, inference, (height, width))
    return ids[index].cpu()


def write_prediction(
    folder: str | Path, path: str | Path, image: Tensor, label_map: Tensor, vocabulary: Vocabulary
) -> dict[str, Any]:
    """Write the three files of the picture `path`; returns what is in the JSON file.

    image: uint8 [3, H, W]; label_map: int64 [H, W] of label-space ids. ValueError if the folder
    cannot be written to or an id does not fit 16 bits.
    """
    if int(label_map.max()) > LARGEST_ID:
        raise ValueError(
            f"class id {int(label_map.max())} does not fit a 16-bit label map; ask for fewer "
            "classes of a smaller label space"
        )
    root, name = make_folder(folder), Path(path).stem
    ids, counts = label_map.unique(return_counts=True)
    areas = sorted(zip(ids.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
    uids, names, labels = vocabulary.uids, vocabulary.names, label_map.numpy()
    keys = ("id", "uid", "name", "pixels", "share")
    rows = [(i, uids[i], names[i], pixels, pixels / labels.size) for i, pixels in areas]
    report = {
        "image": str(path),
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
