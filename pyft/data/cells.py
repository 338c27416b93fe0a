"""The cells of a table's column as numbers or as words. Without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyft.data.raw import counted
from pyft.errors import DataError

MISSING = frozenset({"", "na", "n/a", "#n/a", "nan", "-nan", "<na>", "null", "none"})
"""What stands for a missing number, in lower case; among words only the empty cell is missing."""
TRUTH = {"true": 1.0, "false": 0.0}
LARGEST = float(np.finfo(np.float32).max)


def is_numeric(values: Any) -> bool:
    """Whether more than half of a column's filled cells are numbers; the few others are then an error of their own."""
    if isinstance(values, np.ndarray):
        return True
    filled = [value for value in values if value.strip().lower() not in MISSING]
    if _as_floats(filled) is not None:
        return True
    return sum(is_float(value) for value in filled) * 2 > len(filled)


def column_numbers(table: str, name: str, values: Any, where: Callable[[int], str]) -> np.ndarray:
    """(N,) float64, NaN where a number is missing.

    Args:
        table, name: of the table and the column, for messages.
        values: list of str, or a numeric array.
        where: names a row, for messages.

    Raises:
        DataError: a cell is neither a number nor missing, or is infinite or beyond float32.
    """
    numbers = values.astype(np.float64) if isinstance(values, np.ndarray) else _as_floats(values)
    if numbers is None:
        numbers = np.array([_number(value) for value in values], dtype=np.float64)
        holes = np.flatnonzero(np.isnan(numbers))
        bad = [row for row in holes.tolist() if values[row].strip().lower() not in MISSING]
        if bad:
            raise DataError(
                f"{table}: the column {name!r} holds {counted(len(bad), 'cell')} without a number, first at "
                f"{where(bad[0])} ({values[bad[0]]!r}); write numbers, leave a cell empty where one is missing, or "
                f"say that these are words: preprocess=pyft.TablePreprocess(words=[{name!r}])"
            )
    with np.errstate(invalid="ignore"):
        wild = np.flatnonzero(np.abs(numbers) > LARGEST)
    if len(wild):
        raise DataError(
            f"{table}: the column {name!r} holds {counted(len(wild), 'value')} infinite or beyond float32, first at "
            f"{where(int(wild[0]))} ({numbers[wild[0]]}); scale the column, or mend these rows or leave them out"
        )
    return numbers


def column_words(values: Any) -> np.ndarray:
    """(N,) object array of str; NaN and blank cells are missing: "".

    >>> column_words(np.array([1.5, np.nan])).tolist()
    ['1.5', '']
    """
    words = np.empty(len(values), dtype=object)
    cells = values.tolist() if isinstance(values, np.ndarray) else values
    words[:] = ["" if value != value or not str(value).strip() else str(value) for value in cells]
    return words


def loses_digits(numbers: np.ndarray) -> bool:
    """Whether float32 blurs the differences between the numbers of a column: times in seconds, large ids.

    >>> loses_digits(np.array([1.7e9, 1.7e9 + 1])), loses_digits(np.array([0.1, 0.2]))
    (True, False)
    """
    found = numbers[~np.isnan(numbers)]
    if len(found) < 2:
        return False
    error = np.abs(found - found.astype(np.float32)).max()
    return bool(error > 0.01 * found.std() > 0)


def is_float(value: str) -> bool:
    """Whether Python reads the text as a number."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def _as_floats(values: list[str]) -> np.ndarray | None:
    try:
        return np.array([float(value) for value in values], dtype=np.float64)
    except ValueError:
        return None


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return TRUTH.get(cell.strip().lower(), float("nan"))
