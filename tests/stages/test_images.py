"""Decoding: what is refused, and the resize every image takes."""

from __future__ import annotations

import contextlib
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from stages import images


def encode(pixels: np.ndarray, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (24, 16, 3)).astype(np.uint8)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_damage_of_any_kind_is_a_value_error(form):
    data = encode(NOISE, form)
    rng = np.random.default_rng(1)
    for cut in np.linspace(0, len(data) - 1, 40).astype(int):
        for bad in (data[:cut], data[:cut] + rng.bytes(8) + data[cut + 8 :]):
            # Some damage goes unnoticed by the format; what may not happen is any other exception.
            with contextlib.suppress(ValueError):
                images.open_image(bad)
    with pytest.raises(ValueError, match="not an image of a known format"):
        images.open_image(b"text")


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    # A PNG head that claims 100,000 × 100,000 pixels.
    size = (100_000).to_bytes(4, "big") * 2
    head = b"IHDR" + size + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")
    data = (0).to_bytes(4, "big") + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    with pytest.raises(ValueError, match="exceed"):
        images.open_image(b"\x89PNG\r\n\x1a\n" + chunk + data)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7)])
def test_png_is_lossless_and_deterministic(shape):
    pixels = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
    data = images.encode_png(pixels)
    decoded = np.asarray(images.open_image(data))
    np.testing.assert_array_equal(decoded if shape[0] == 1 else decoded.transpose(2, 0, 1), pixels.squeeze())
    assert images.encode_png(pixels.copy()) == data


def test_pixels_of_the_right_size_are_untouched():
    square = NOISE[:16]
    np.testing.assert_array_equal(images.to_pixels(encode(square), 16, 3), square.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (72, 64), (7, 90)])
def test_the_centre_is_kept(shape):
    # A ramp along the longer side: its middle stays in the middle.
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    grey = np.broadcast_to(ramp[:, None] if shape[0] > shape[1] else ramp, shape)
    out = images.to_pixels(encode(np.ascontiguousarray(grey)), 16, 1)
    assert out.shape == (1, 16, 16)
    along = out[0].mean(1) if shape[0] > shape[1] else out[0].mean(0)
    expected = 127.5 + (np.arange(16) - 7.5) * 255 / (max(shape) / min(shape) * 16)
    assert np.abs(along - expected).max() < 5


def test_the_shorter_side_may_be_resized_to_more_than_the_crop():
    """ImageNet's pair: resize 256, crop 224; here 40 × 20 → 32 × 16 → the centre 8 × 8 of it."""
    ramp = np.broadcast_to(np.linspace(0, 255, 40).astype(np.uint8)[:, None], (40, 20))
    data = encode(np.ascontiguousarray(ramp))
    np.testing.assert_array_equal(
        images.to_pixels(data, 8, 1, resize=16)[0], images.to_pixels(data, 16, 1)[0, 4:12, 4:12]
    )
    square = encode(NOISE[:16])
    np.testing.assert_array_equal(images.to_pixels(square, 8, 3, resize=16), NOISE[4:12, 4:12].transpose(2, 0, 1))


def test_channels_are_converted():
    grey = NOISE[:16, :, 0]
    np.testing.assert_array_equal(images.to_pixels(encode(grey), 16, 3), np.repeat(grey[None], 3, 0))
    assert images.to_pixels(encode(NOISE[:16]), 16, 1).shape == (1, 16, 16)
