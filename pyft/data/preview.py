"""A sample as a reader sees it, small and plain enough for a JSON file: a text, a small picture, or a few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyft.core.pictures import data_uri
from pyft.data.arrays import as_tensor, is_picture
from pyft.data.images import read_image, to_rgb
from pyft.errors import MissingExtraError, need
from pyft.samples import Samples

MAX_LETTERS = 4000
MAX_NUMBERS = 4096
PICTURE_RANKS = (2, 3)
SMALLEST_PICTURE = 5


def preview(samples: Samples, number: int) -> dict[str, Any]:
    """Sample `number` as JSON values.

    Returns:
        {"text", "cut"} with `cut` true where letters were left off; {"picture", "path", "size"}: a data URI of at most
        192 pixels a side, the file it came from or None, (width, height) of the original; or {"values", "shape",
        "columns", "picture"}: the numbers, flat, None where there are more than 4,096, and a picture where the shape is
        one of a picture. Of a row with words, "values" are numbers, None where one is missing, and words.

    Raises:
        DataError: an image cannot be read.
    """
    value = samples.inputs[number]
    if samples.kind == "text":
        text = str(value)
        return {"text": text[:MAX_LETTERS], "cut": len(text) > MAX_LETTERS}
    if is_picture(value) or isinstance(value, (str, Path)):
        return _of_picture(value)
    if isinstance(value, Mapping):
        return _of_row(value)
    return _of_numbers(as_tensor(value).numpy(), samples.columns)


def _of_picture(value: Any) -> dict[str, Any]:
    if is_picture(value):
        image, path = to_rgb(value), None
    else:
        image, path = read_image(value), str(Path(value).resolve())
    return {"picture": data_uri(image), "path": path, "size": list(image.size)}


def _of_row(row: Mapping[str, float | str]) -> dict[str, Any]:
    values = [cell[:MAX_LETTERS] if isinstance(cell, str) else _finite(float(cell)) for cell in row.values()]
    return {"values": values, "shape": [len(values)], "columns": list(row), "picture": None}


def _of_numbers(array: np.ndarray, columns: tuple[str, ...] | None) -> dict[str, Any]:
    values = [_finite(value) for value in array.reshape(-1).tolist()] if array.size <= MAX_NUMBERS else None
    names = list(columns) if columns is not None and array.ndim == 1 and len(columns) == array.size else None
    return {"values": values, "shape": list(array.shape), "columns": names, "picture": _drawn(array)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drawn(array: np.ndarray) -> str | None:
    """A data URI of an array that has the shape of a picture, (H, W) or (1 or 3, H, W), from its smallest to its
    largest number; None for any other, and without Pillow."""
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
        array = array[..., 0] if array.shape[2] == 1 else array
    elif array.ndim != 2:
        return None
    height, width = array.shape[:2]
    if min(height, width) < SMALLEST_PICTURE or max(height, width) > 4 * min(height, width):
        return None
    if not np.isfinite(array).all():
        return None
    low, high = float(array.min()), float(array.max())
    pixels = ((array - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)
    try:
        module = need("PIL.Image", "image", "drawing samples")
    except MissingExtraError:
        return None
    return data_uri(module.fromarray(pixels))
