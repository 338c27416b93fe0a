"""Pictures inside a page."""

from __future__ import annotations

import base64
import io
from typing import Any

from pyft.errors import DataError

SIDE = 192
"""Longest side of a small picture, pixels."""
FEW = 64
"""Pixels a side up to which each pixel is kept."""


def data_uri(image: Any, side: int = SIDE) -> str:
    """A PIL image of at most `side` pixels as a data URI: PNG where it is small, so that each pixel is kept, else JPEG.

    Raises:
        DataError: it has no pixels.
    """
    if 0 in image.size:
        raise DataError("picture: it has no pixels")
    few = max(image.size) <= FEW
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    if few:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=80, optimize=True)
    kind = "png" if few else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
