"""Inputs that no model can use: NaN, infinity, blank texts. Needs NumPy, not torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyft.data.raw import counted
from pyft.errors import DataError


def check_finite(values: Any, where: str, what: str) -> None:
    """Refuse NaN and infinity in an array or Tensor (N, ...) on the CPU.

    Raises:
        DataError: it names the first.
    """
    array = np.asarray(values)
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return
    bad = ~np.isfinite(array)
    place = [int(number) for number in np.argwhere(bad)[0]]
    rows = int(bad.reshape(len(bad), -1).any(axis=1).sum())
    column = f", column {place[1]}" if len(place) == 2 else f", position {tuple(place[1:])}" if len(place) > 2 else ""
    raise DataError(
        f"{where}: {counted(int(bad.sum()), what)} NaN or infinite, in {counted(rows, 'row')}, first "
        f"at row {place[0]}{column}; "
        f"mend these rows or leave them out"
        + (", or say preprocess='table', which fills gaps with the median" if what == "input" and bad.ndim == 2 else "")
    )


def check_texts(texts: Any, where: str) -> None:
    """Refuse blank texts and what is no text.

    Raises:
        DataError: it names the first.
    """
    bad = [row for row, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if not bad:
        return
    first = texts[bad[0]]
    what = "blank" if isinstance(first, str) else f"not a str but {type(first).__name__}"
    raise DataError(
        f"{where}: {len(bad)} of {counted(len(texts), 'text')} {what}, first at row {bad[0]}; "
        f"fill or leave out these rows"
    )
