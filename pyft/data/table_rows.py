"""Rows of a table as they came, and what is known of a table before it is read. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyft.data.raw import counted, listed, nearest
from pyft.errors import DataError


@dataclass(frozen=True)
class TableForm:
    """What is known of a table before it is read.

    Attributes:
        columns: the features that the model takes, in its order; None: all columns but the label.
        words: columns whose cells are words, whatever they look like. With `columns`, all others hold numbers;
            without, the cells of the others tell.
        leave_out: columns that are no features.
        raw: True: keep raw columns (`TableRows`), whatever the cells are; False: numbers only, none missing; None:
            raw columns where a cell is a word or is missing.
    """

    columns: tuple[str, ...] | None = None
    words: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    raw: bool | None = None

    @classmethod
    def of(cls, given: Sequence[str] | TableForm | None) -> TableForm:
        """The form itself, or that of a model which takes the numbers of these columns."""
        if isinstance(given, TableForm):
            return given
        return cls() if given is None else cls(columns=tuple(given), raw=False)


class TableRows:
    """N rows of named columns; row i is a dict of float (NaN: missing) and str ("": missing).

    Args:
        columns: name -> (N,) float32 array of numbers, or (N,) object array of str.

    >>> rows = TableRows({"age": np.float32([31, np.nan]), "town": np.array(["Ulm", ""], dtype=object)})
    >>> len(rows), rows[0], rows.words
    (2, {'age': 31.0, 'town': 'Ulm'}, ('town',))
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self.columns = dict(columns)

    @classmethod
    def from_matrix(cls, matrix: Any, names: Sequence[str] | None, name: str = "X") -> TableRows:
        """The columns of an array or tensor (N, F) of numbers; without names they are "x0", "x1", ...

        Raises:
            DataError: another shape, an infinite number, or another number of columns than names.
        """
        values = matrix.detach().cpu().numpy() if hasattr(matrix, "detach") else np.asarray(matrix)
        if values.ndim != 2 or values.dtype.kind not in "iufb":
            raise DataError(
                f"{name}: expected a table of numbers (N, F) for preprocess='table', got shape {values.shape}, "
                f"{values.dtype}; leave out preprocess='table' for arrays of other shapes"
            )
        names = [f"x{number}" for number in range(values.shape[1])] if names is None else names
        if values.shape[1] != len(names):
            raise DataError(
                f"{name}: has {counted(values.shape[1], 'column')}, the model takes {len(names)}: {listed(names, 12)}; "
                f"give these, in this order, or a table with their names"
            )
        columns = {column: values[:, place].astype(np.float32) for place, column in enumerate(names)}
        for column, numbers in columns.items():
            if np.isinf(numbers).any():
                row = int(np.flatnonzero(np.isinf(numbers))[0])
                raise DataError(f"{name}: the column {column!r} is infinite at row {row}; mend it or leave the row out")
        return cls(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] if values.dtype == object else float(values[row])
                for name, values in self.columns.items()}  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns in order."""
        return tuple(self.columns)

    @property
    def words(self) -> tuple[str, ...]:
        """Names of the columns of words."""
        return tuple(name for name, values in self.columns.items() if values.dtype == object)

    def take(self, index: np.ndarray | Sequence[int]) -> TableRows:
        """The rows of these numbers, in this order."""
        numbers = np.asarray(index, dtype=np.int64)
        return TableRows({name: values[numbers] for name, values in self.columns.items()})

    def select(self, names: Iterable[str], name: str = "the table") -> TableRows:
        """These columns, in this order.

        Raises:
            DataError: one is missing.
        """
        return TableRows(named_columns(self.columns, list(names), name))

    def gaps(self) -> dict[str, int]:
        """Column of numbers -> cells without one, where there are any."""
        counts = {name: int(np.isnan(v).sum()) for name, v in self.columns.items() if v.dtype != object}
        return {name: count for name, count in counts.items() if count}

    @classmethod
    def join(cls, parts: Sequence[TableRows]) -> TableRows:
        """The rows of several tables with the same columns, one after the other."""
        return cls({name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].names})


def named_columns(columns: Mapping[str, Any], names: Sequence[str], table: str) -> dict[str, Any]:
    """The columns that a model takes, in its order: by position they could be mixed up in silence.

    Raises:
        DataError: columns are missing; they are named, with the nearest.
    """
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(
            f"{table}: {counted(len(missing), 'feature column')} that the model was trained on "
            f"{'is' if len(missing) == 1 else 'are'} missing: {listed(missing)}"
            f"{nearest(missing[0], list(columns))}; it has {listed(list(columns), 12)}"
        )
    return {name: columns[name] for name in names}
