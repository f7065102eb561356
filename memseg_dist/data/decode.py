"""Bytes of a shard's member to tensors. An allow-list: images by Pillow, labels by JSON, no pickle.

Shape letters: H x W pixels as stored. An EXIF rotation is not applied, so that images and masks
stay paired.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from memseg_dist.batch import IGNORE

IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_ENDS = {"jpg": b"\xff\xd9", "jpeg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}
MASK_EXTENSION = "mask.png"
MASK_IGNORE = 65535
PICKLE_EXTENSIONS = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill"})
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb


class CorruptSample(ValueError):
    """A member that cannot be decoded; the text says which (path, shard, key) and why."""


def open_image(content: bytes, image_format: str) -> Image.Image:
    """The image with only its header read, and a PNG's checksums; CorruptSample unless it is what
    it says it is.
    """
    if image_format not in IMAGE_FORMATS:
        raise CorruptSample(
            f"image format {image_format!r} is not allowed; known are {sorted(IMAGE_FORMATS)}"
        )
    expected = IMAGE_FORMATS[image_format]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=[expected])
            if expected == "PNG":  # whose checksums decoding passes over
                image.verify()
                image = Image.open(io.BytesIO(content), formats=[expected])
    except Exception as error:  # Pillow lets errors of many kinds through, as of a bad gAMA chunk
        raise CorruptSample(f"not a readable {expected} image ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise CorruptSample(
            f"image of {image.width} x {image.height} pixels is above the limit of {MAX_PIXELS}"
        )
    return image


def check_whole(content: bytes, image_format: str) -> None:
    """CorruptSample for a file that is cut short. Only one whose end looks wrong is decoded."""
    if image_format == "webp":
        is_whole = len(content) >= 8 + int.from_bytes(content[4:8], "little")
    else:
        is_whole = content.rstrip(b"\0").endswith(_ENDS[image_format])
    if not is_whole:
        decode_image(content, image_format)


def load_pixels(image: Image.Image, mode: str | None = None) -> np.ndarray:
    """The values as stored, or in Pillow's `mode`; CorruptSample if the data is damaged."""
    try:
        image.load()  # before a conversion, whose errors say less
        return np.array(image if mode in (None, image.mode) else image.convert(mode))
    except Exception as error:  # as above
        raise CorruptSample(f"{image.format} data is damaged or cut short ({error})") from error


def decode_image(content: bytes, image_format: str) -> Tensor:
    """uint8 [3, H, W], RGB."""
    image = open_image(content, image_format)
    if image.mode.startswith("I") or image.mode == "F":
        raise CorruptSample(f"image has mode {image.mode!r}; store 8 bits per channel")
    return torch.from_numpy(load_pixels(image, "RGB")).permute(2, 0, 1)


def decode_mask(content: bytes) -> Tensor:
    """int32 [H, W] of local class ids, IGNORE where the file says 65535."""
    image = open_image(content, "png")
    if image.mode not in ("I;16", "I;16B", "I"):
        raise CorruptSample(
            f"mask has mode {image.mode!r}; it must be a 16-bit grey PNG with {MASK_IGNORE} for "
            "unknown pixels"
        )
    mask = load_pixels(image).astype(np.int32)
    mask[mask == MASK_IGNORE] = IGNORE
    return torch.from_numpy(mask)


def encode_mask(mask: NDArray[np.uint16]) -> bytes:
    """uint16 [H, W] -> 16-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()
