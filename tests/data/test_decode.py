"""The allow-list decoder."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from data.made import blocks, encoded
from PIL import Image

from memseg_dist.data.decode import (
    CorruptSample,
    decode_image,
    decode_mask,
    encode_mask,
)


def saved(image, image_format):
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def test_images_of_each_format():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    for name, image_format in (("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")):
        made = decode_image(saved(Image.fromarray(pixels), image_format), name)
        assert made.shape == (3, 8, 9)
        assert made.dtype == torch.uint8
        if name == "png":
            assert np.array_equal(made.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    image_format = "TIFF" if mode == "CMYK" else "PNG"
    content = saved(image, "JPEG") if image_format == "TIFF" else saved(image, "PNG")
    made = decode_image(content, "jpg" if image_format == "TIFF" else "png")
    assert made.shape == (3, 3, 4)
    assert (made >= 250).all()


def test_what_is_not_allowed_is_refused():
    with pytest.raises(CorruptSample, match="image format 'tiff' is not allowed; known are"):
        decode_image(b"", "tiff")
    with pytest.raises(CorruptSample, match="not a readable JPEG image"):
        decode_image(encoded(0, image_format="PNG"), "jpg")
    deep = Image.fromarray(np.zeros((3, 3), np.uint16))
    with pytest.raises(CorruptSample, match="mode 'I;16'; store 8 bits per channel"):
        decode_image(saved(deep, "PNG"), "png")


def test_no_bit_of_a_mask_is_other_in_silence():
    """Pillow decodes a PNG without looking at its checksums."""
    content = encode_mask(blocks(3))
    for bit in range(8 * 41, 8 * (len(content) - 12)):  # the pixels and their checksum
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptSample, match="not a readable PNG image"):
            decode_mask(bytes(damaged))


def test_a_decompression_bomb_is_refused():
    bomb = saved(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(CorruptSample, match="10000 x 10000 pixels is above the limit"):
        decode_image(bomb, "png")
    huge = saved(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(CorruptSample, match=r"not a readable PNG image.*bomb"):
        decode_image(huge, "png")


def png_with(kind, content):
    """A PNG with one more chunk behind its header."""
    png = saved(Image.new("RGB", (4, 3)), "PNG")
    check = struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + struct.pack(">I", len(content)) + kind + content + check + png[33:]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"gAMA", b""),
        (b"tRNS", b"\0"),
        (b"pHYs", b"\0"),
        (b"iCCP", b"name\0\0" + zlib.compress(bytes(80 << 20))),
        (b"zTXt", b"name\0\0" + zlib.compress(bytes(80 << 20))),
    ],
)
def test_chunks_that_pillow_refuses_make_a_corrupt_sample(kind, content):
    with pytest.raises(CorruptSample, match=r"not a readable PNG image|PNG data is damaged"):
        decode_image(png_with(kind, content), "png")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_cut_images_are_refused(image_format):
    content = encoded(0, 100, 100, image_format)
    name = "jpg" if image_format == "JPEG" else image_format.lower()
    with pytest.raises(CorruptSample, match=r"cut short|not a readable"):
        decode_image(content[: len(content) // 2], name)


def test_masks():
    mask = blocks(1)
    mask[0, 0] = 65534
    made = decode_mask(encode_mask(mask))
    assert made.dtype == torch.int32
    assert made[0, 0] == 65534
    assert torch.equal(made == -1, torch.from_numpy(mask == 65535))
    with pytest.raises(CorruptSample, match="mask has mode 'L'; it must be a 16-bit grey PNG"):
        decode_mask(saved(Image.new("L", (3, 3)), "PNG"))
