"""Tables of numbers and words as features: imputation, scaling and one-hot, fitted on the training rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyft.data.raw import counted, listed
from pyft.data.table_rows import TableForm, TableRows
from pyft.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

MAX_WORDS = 256
SHOWN = 6


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers: missing ones become `median`, then (x - mean) / std, all in float32."""

    name: str
    median: float
    mean: float
    std: float


@dataclass(frozen=True)
class WordColumn:
    """A column of words: one feature per value, 1 where the cell is that value."""

    name: str
    values: tuple[str, ...]


class TablePreprocess:
    """From the raw columns of a table to float32 features (B, F), the same in training, prediction and the ONNX file.

    Columns of numbers: a missing one becomes the median of the training rows, then (x - mean) / std of the training
    rows after that; a constant column becomes 0. Columns of words: one feature per value that occurs in the training
    rows, sorted; any other value is all zeros. A missing word is the value "" where training has one, else all zeros.
    The features are those of all numbers and then those of all words.

    Args:
        words: columns whose cells are words even where they look like numbers, such as postal codes.
        leave_out: columns that are no features, such as ids.
        max_words: the most values that a column of words may have.

    `pyft.finetune(..., preprocess=TablePreprocess(...))` fits it; the word "table" is one with these defaults.

    >>> rows = TableRows({"age": np.float32([30, np.nan, 50]), "town": np.array(["Ulm", "", "Bonn"], dtype=object)})
    >>> table = TablePreprocess().fit(rows)
    >>> table.feature_names()
    ['age', 'town=', 'town=Bonn', 'town=Ulm']
    >>> table.matrix(rows).round(2).tolist()[0]
    [-1.2200000286102295, 0.0, 0.0, 1.0]
    """

    def __init__(self, *, words: Sequence[str] = (), leave_out: Sequence[str] = (), max_words: int = MAX_WORDS) -> None:
        for argument, names in (("words", words), ("leave_out", leave_out)):
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"{argument}={names!r}: expected a list of column names")
        if isinstance(max_words, bool) or not isinstance(max_words, int) or max_words < 1:
            raise ConfigError(f"max_words={max_words!r}: expected a whole number of 1 or more")
        self.words, self.leave_out, self.max_words = tuple(words), tuple(leave_out), max_words
        self.columns: tuple[str, ...] = ()
        self.number_columns: tuple[NumberColumn, ...] = ()
        self.word_columns: tuple[WordColumn, ...] = ()
        self.notes: tuple[str, ...] = ()

    # ------------------------------------------------------------ fit

    def fit(self, rows: TableRows, name: str = "the table") -> TablePreprocess:
        """The preprocessing fitted to these training rows; this object stays as it is.

        Its `notes` say what was filled in and how many features came out.

        Args:
            name: of the table, for messages.

        Raises:
            DataError: a column of numbers is empty; a column of words has more than `max_words` values, or nearly as
                many as there are rows.
        """
        made = copy.copy(self)
        made.columns = rows.names
        made.number_columns = tuple(
            _fit_numbers(rows.columns[column], column, name) for column in rows.names if column not in rows.words
        )
        made.word_columns = tuple(
            _fit_words(rows.columns[column], column, name, self.max_words) for column in rows.words
        )
        made.notes = tuple(_fit_notes(made, rows, name))
        return made

    @property
    def fitted(self) -> bool:
        """Whether it has seen training rows."""
        return bool(self.columns)

    def feature_names(self) -> list[str]:
        """F names in the order of the features: "age", "town=Ulm", ..."""
        self._check_fitted()
        names = [column.name for column in self.number_columns]
        return names + [f"{column.name}={value}" for column in self.word_columns for value in column.values]

    def form(self) -> TableForm:
        """How a table must be read for it."""
        if not self.fitted:
            return TableForm(words=self.words, leave_out=self.leave_out, raw=True)
        return TableForm(self.columns, tuple(column.name for column in self.word_columns), raw=True)

    # ------------------------------------------------------------ use

    def __call__(self, rows: TableRows | Mapping[str, Any]) -> torch.Tensor:
        """(B, F) float32 Tensor; (F,) of one row, a dict of column -> number or word."""
        import torch

        return torch.from_numpy(self.matrix(rows))

    def matrix(self, rows: TableRows | Mapping[str, Any]) -> np.ndarray:
        """As calling it, as a NumPy array. Needs no torch."""
        if not isinstance(rows, TableRows):
            return self.matrix(self._row(rows))[0]
        numbers, codes = self.encode(rows)
        return self.gather(numbers, codes)

    def encode(self, rows: TableRows) -> tuple[np.ndarray, np.ndarray]:
        """Scaled numbers (N, columns) float32 and the place of each word among the features (N, columns); -1: none."""
        self._check_fitted()
        rows = rows.select(self.columns)
        numbers = np.empty((len(rows), len(self.number_columns)), dtype=np.float32)
        for place, column in enumerate(self.number_columns):
            values = rows.columns[column.name].astype(np.float32)
            filled = np.where(np.isnan(values), np.float32(column.median), values)
            numbers[:, place] = (filled - np.float32(column.mean)) / np.float32(column.std)
        codes = np.empty((len(rows), len(self.word_columns)), dtype=np.int64)
        begin = len(self.number_columns)
        for place, words in enumerate(self.word_columns):
            places = {value: begin + number for number, value in enumerate(words.values)}
            codes[:, place] = [places.get(cell, -1) for cell in rows.columns[words.name].tolist()]
            begin += len(words.values)
        return numbers, codes

    def gather(self, numbers: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(B, F) float32 of what `encode` gave."""
        features = np.zeros((len(numbers), self.num_features), dtype=np.float32)
        features[:, : numbers.shape[1]] = numbers
        row, column = np.nonzero(codes >= 0)
        features[row, codes[row, column]] = 1
        return features

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.number_columns) + sum(len(column.values) for column in self.word_columns)

    def surprises(self, rows: TableRows, name: str) -> list[str]:
        """What of these rows training has not seen: unknown words, and gaps in columns that had none to learn from."""
        lines = []
        for column in self.word_columns:
            known = set(column.values)
            cells = [cell for cell in rows.columns[column.name].tolist() if cell not in known]
            if cells:
                what = listed(list(dict.fromkeys(cells)), SHOWN)
                lines.append(
                    f"{name}: {len(cells)} of {counted(len(rows), 'value')} of {column.name!r} did not occur in "
                    f"training ({what}) and count as no value"
                )
        return lines

    def _row(self, row: Mapping[str, Any]) -> TableRows:
        self._check_fitted()
        words = {column.name for column in self.word_columns}
        missing = [column for column in self.columns if column not in row]
        if missing:
            raise DataError(f"a row lacks {listed(missing)}; give a dict with {listed(self.columns, 12)}")
        return TableRows(
            {
                column: np.array([row[column]], dtype=object if column in words else np.float32)
                for column in self.columns
            }
        )

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise ConfigError(
                "preprocess: this TablePreprocess has seen no training rows; give it to pyft.finetune, or use what "
                "its fit(rows) gives"
            )

    # ------------------------------------------------------------ JSON

    def spec(self) -> dict[str, Any]:
        """All that `from_spec` needs, as JSON values; float32 numbers keep every bit."""
        spec: dict[str, Any] = {"kind": "table"}
        if not self.fitted:
            return {**spec, "words": list(self.words), "leave_out": list(self.leave_out), "max_words": self.max_words}
        return {
            **spec,
            "columns": list(self.columns),
            "numbers": [
                {"name": column.name, "median": column.median, "mean": column.mean, "std": column.std}
                for column in self.number_columns
            ],
            "one_hot": [{"name": column.name, "values": list(column.values)} for column in self.word_columns],
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> TablePreprocess:
        """The preprocessing that `spec()` described.

        Raises:
            ConfigError: the spec is not of a table, or is not whole.
        """
        try:
            if "columns" not in spec:
                options = {key: spec[key] for key in ("words", "leave_out", "max_words") if key in spec}
                return cls(**options)
            made = cls()
            made.columns = tuple(spec["columns"])
            made.number_columns = tuple(NumberColumn(**column) for column in spec["numbers"])
            made.word_columns = tuple(WordColumn(one["name"], tuple(one["values"])) for one in spec["one_hot"])
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"preprocess: the description of a table is not whole ({error}); expected what "
                f"TablePreprocess.spec() gives"
            ) from None
        return made


def _fit_numbers(values: np.ndarray, column: str, table: str) -> NumberColumn:
    found = values[~np.isnan(values)].astype(np.float64)
    if not len(found):
        raise DataError(
            f"{table}: the column {column!r} is empty in all {counted(len(values), 'training row')}; leave it out: "
            f"preprocess=pyft.TablePreprocess(leave_out=[{column!r}])"
        )
    median = float(np.float32(np.median(found)))
    filled = np.where(np.isnan(values), np.float32(median), values).astype(np.float64)
    constant = filled.min() == filled.max()
    # Rounded here, so that every user of the numbers computes with the same float32.
    mean = float(np.float32(filled[0] if constant else filled.mean()))
    std = 1.0 if constant else float(np.float32(filled.std()))
    return NumberColumn(column, median, mean, std or 1.0)


def _fit_words(values: np.ndarray, column: str, table: str, max_words: int) -> WordColumn:
    distinct = sorted(set(values.tolist()))
    filled = int(np.count_nonzero(values != ""))
    ids = filled >= 20 and len(distinct) * 2 > filled
    if len(distinct) <= max_words and not ids:
        return WordColumn(column, tuple(distinct))
    example = next(word for word in distinct if word)
    mend = f"leave it out: preprocess=pyft.TablePreprocess(leave_out=[{column!r}]), or write fewer values into it"
    if not ids:
        mend += f"; TablePreprocess(max_words={len(distinct)}) takes them all"
    raise DataError(
        f"{table}: the column {column!r} holds {len(distinct)} different words in {counted(len(values), 'row')}, such "
        f"as {example[:40]!r}: {'an id or free text, no category' if ids else f'more than {max_words}'}; {mend}; for a "
        f"text task name it by text_column="
    )


def _fit_notes(made: TablePreprocess, rows: TableRows, name: str) -> list[str]:
    parts = []
    if made.number_columns:
        parts.append(f"{counted(len(made.number_columns), 'column')} of numbers scaled")
    if made.word_columns:
        words = [f"{column.name!r} ({counted(len(column.values), 'value')})" for column in made.word_columns]
        more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
        parts.append(f"{counted(len(words), 'column')} of words one-hot: {', '.join(words[:SHOWN])}{more}")
    notes = [f"{name}: {' and '.join(parts)}; {counted(made.num_features, 'feature')} for the model"]
    medians = {column.name: column.median for column in made.number_columns}
    for column, count in rows.gaps().items():
        notes.append(
            f"{name}: {column!r} misses {count:,} of {counted(len(rows), 'number')} in training; the median, "
            f"{medians[column]:g}, fills them"
        )
    return notes
