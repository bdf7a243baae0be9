"""Encoded images to pixels and back."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

# A decoder limit against decompression bombs; larger photographs than this are no training images.
MAX_PIXELS = 64 * 2**20
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
ImageFile.LOAD_TRUNCATED_IMAGES = False


def open_image(data: bytes) -> Image.Image:
    """Decode PNG, JPEG or any other format Pillow reads.

    Raises:
        ValueError: not an image, truncated, or more than ``MAX_PIXELS`` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels exceed the limit of {MAX_PIXELS}")
        image.load()
    except UnidentifiedImageError:
        # Its own words name a memory address, which would differ from run to run.
        raise ValueError("not an image of a known format") from None
    except Exception as error:
        # Decoders raise anything at all on damaged data: OSError, SyntaxError, struct.error, IndexError, …
        raise ValueError(str(error) or type(error).__name__) from None
    return image


def to_pixels(data: bytes, size: int, channels: int, resize: int | None = None) -> NDArray[np.uint8]:
    """Decode, resize the shorter side, crop the centre.

    Args:
        data: encoded image.
        size: side of the result.
        channels: 3 = RGB, 1 = grey.
        resize: length of the shorter side before the crop, at least ``size``; None: ``size``.

    Returns:
        uint8 [channels, size, size].
    """
    image = open_image(data).convert("RGB" if channels == 3 else "L")
    shorter = resize or size
    if min(image.size) != shorter:
        scale = shorter / min(image.size)
        width, height = (max(shorter, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if image.size != (size, size):
        width, height = image.size
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None].copy() if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Lossless PNG of uint8 [channels, height, width]; equal pixels give equal bytes."""
    image = Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0))
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=6)
    return out.getvalue()
