"""Saliency maps that lie beside a data set: FOLDER/<key>.png, 8-bit grey, of the image's size.

They are not part of the shards, so that one data set can be trained with the maps of several
saliency models. Read anew each time, also from a URL: keep them near the workers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memseg_dist.data.decode import CorruptSample, load_pixels, open_image
from memseg_dist.data.files import exists, join, read_bytes


def saliency_path(folder: str, key: str) -> str:
    """The map of the sample `key`, whose '/' are folders; a path or an fsspec URL."""
    return join(folder, f"{key}.png")


def check_has_saliency(folder: str, key: str) -> None:
    """ValueError naming the key and the folder if the sample has no map."""
    if not exists(saliency_path(folder, key)):
        raise ValueError(
            f"sample {key!r} has no saliency map {saliency_path(folder, key)}; write one 8-bit "
            f"grey PNG per key into {folder}, or run without saliency"
        )


def read_saliency(folder: str, key: str, size: tuple[int, int]) -> Tensor:
    """uint8 [H, W], 255 = salient; size: (H, W) of the image.

    ValueError for a missing file, CorruptSample for one that cannot be used; both name the key.
    """
    check_has_saliency(folder, key)
    path = saliency_path(folder, key)
    where = f"saliency map {path} of sample {key!r}"
    try:
        image = open_image(read_bytes(path), "png")
        if image.mode != "L":
            raise CorruptSample(f"mode is {image.mode!r}; store 8-bit grey, 255 = salient")
        pixels = load_pixels(image)
    except CorruptSample as error:
        raise CorruptSample(f"{where}: {error}") from error
    if pixels.shape != size:
        raise CorruptSample(
            f"{where}: it is {pixels.shape[1]} x {pixels.shape[0]} pixels but the image is "
            f"{size[1]} x {size[0]}; write the maps in {folder} at the images' stored size"
        )
    return torch.from_numpy(pixels)
