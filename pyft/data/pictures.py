"""Pictures in NumPy alone: reading, turning upright, resizing and cropping, scaling. Needs Pillow, not torch."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import DataError, need

# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def is_picture(value: Any) -> bool:
    """Whether `value` is a PIL image, without importing Pillow."""
    return any(base.__module__ == "PIL.Image" and base.__name__ == "Image" for base in type(value).__mro__)


def read_image(path: str | Path) -> Any:
    """A PIL image in RGB, turned upright by its EXIF orientation.

    16-bit grey is scaled to 8 bits; transparency is dropped; of an animation the first picture is taken.

    Raises:
        DataError: the file is missing, truncated, or not an image.
        MissingExtraError: Pillow is not installed.
    """
    image_module = need("PIL.Image", "image", "reading images")
    try:
        with image_module.open(path) as image:
            return to_rgb(image)
    except (*_DECODE_ERRORS, image_module.DecompressionBombError) as error:
        raise DataError(f"{path}: {_fault(path, error)}; replace or remove it") from None


def to_rgb(image: Any) -> Any:
    """A loaded PIL image in RGB, upright. See `read_image`."""
    ops = need("PIL.ImageOps", "image", "reading images")
    image.load()
    image = ops.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("a float picture has no fixed range; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_16_bit(image: Any) -> Any:
    """Pillow's own conversion clips at 255, which makes most 16-bit pictures white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("a 32-bit picture has no fixed range; save it with 8 or 16 bits")
    module = need("PIL.Image", "image", "reading images")
    return module.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _fault(path: str | Path, error: BaseException) -> str:
    if not os.path.exists(path):
        return "the file does not exist"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"
    return f"damaged or truncated ({error})"


def image_fault(image: Any) -> str | None:
    """Why a path or PIL image cannot be decoded, in a few words; None when it can.

    Args:
        image: path, or PIL image.
    """
    image_module = need("PIL.Image", "image", "reading images")
    try:
        if is_picture(image):
            image.load()
            return "it has no pixels" if 0 in image.size else None
        with image_module.open(image) as opened:
            # A JPEG is then decoded at an eighth of its size, which reads, and so checks, all of its data.
            opened.draft("RGB", (1, 1))
            opened.load()
            return "a float picture has no fixed range" if opened.mode == "F" else None
    except (*_DECODE_ERRORS, image_module.DecompressionBombError) as error:
        return "damaged" if is_picture(image) else _fault(image, error)


def upright(image: Any) -> Any:
    """A PIL image in RGB, upright, of a path, a PIL image or a uint8 array (H, W, 3).

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"picture: expected a uint8 array (H, W, 3), got {image.dtype} of shape {image.shape}")
        return need("PIL.Image", "image", "resizing images").fromarray(image)
    if not is_picture(image):
        return read_image(image)
    try:
        return to_rgb(image)
    except _DECODE_ERRORS as error:
        raise DataError(f"picture: damaged or of an unknown form ({error})") from None


def cropped_pixels(image: Any, size: int, resize: int, interpolation: str) -> NDArray[np.uint8]:
    """(3, size, size) uint8: the shorter side resized to `resize` pixels, then the centre.

    Args:
        image: path, PIL image, or uint8 array (H, W, 3).
        interpolation: one of Pillow's filters, "bilinear" for instance.

    Raises:
        DataError: it cannot be read.
    """
    image = upright(image)
    width, height = image.size
    short = min(width, height)
    if short != resize:
        # torchvision's rule: the longer side is cut to a whole pixel.
        to = tuple(resize if side == short else int(resize * side / short) for side in (width, height))
        filters = need("PIL.Image", "image", "resizing images").Resampling
        image = image.resize(to, getattr(filters, interpolation.upper()))
    left, top = (round((side - size) / 2) for side in image.size)
    array = np.asarray(image.crop((left, top, left + size, top + size)))
    # Pillow gives arrays that cannot be written to; torch warns of them.
    return np.array(array.transpose(2, 0, 1), order="C")


def normalised(
    pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float], scale: float
) -> NDArray[np.float32]:
    """(B, 3, H, W) uint8 to float32: (pixel * scale - mean) / std, with the bits that torch gives."""
    values = pixels.astype(np.float32)
    values *= np.float32(scale)
    values -= np.array(mean, np.float32).reshape(3, 1, 1)
    values /= np.array(std, np.float32).reshape(3, 1, 1)
    return values
