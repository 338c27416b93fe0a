"""Tables: reading .tsv and .csv files, DataFrames and dicts, and finding the columns that hold inputs and labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyft.data.cells import is_numeric
from pyft.data.raw import check_exists, counted, listed, nearest
from pyft.errors import DataError
from pyft.samples import Kind

TEXT_NAMES = (
    *("text", "sentence", "utterance", "texts", "sentences", "message", "content", "query", "question"),
    *("review", "comment", "document", "tweet", "title", "body"),
)
LABEL_NAMES = ("label", "labels", "intent", "class", "target", "category", "y")
TABLE_SUFFIXES = (".tsv", ".csv")


@dataclass(frozen=True)
class Table:
    """Named columns of equal length.

    Attributes:
        name: of the file or argument, for messages.
        columns: name -> list of str, or numeric array (N,).
        lines: line number of each row in the file; None for in-memory tables.
        notes: lines worth telling the user.
        categories: columns that the source itself declares to be words.
    """

    name: str
    columns: dict[str, Any]
    lines: list[int] | None = None
    notes: tuple[str, ...] = ()
    categories: frozenset[str] = frozenset()

    def where(self, row: int) -> str:
        """'line 17' of a file, or 'row 15' (counted from 0)."""
        return f"row {row}" if self.lines is None else f"line {self.lines[row]}"

    @property
    def num_rows(self) -> int:
        """Rows without the header."""
        return len(next(iter(self.columns.values())))


def read_table(path: Path) -> Table:
    """Read a .tsv (tab separated, no quoting) or .csv (comma separated, RFC 4180 quotes) file with a header line.

    UTF-8 with or without byte order mark; LF, CRLF or CR line ends; blank lines are skipped.

    Raises:
        DataError: the file is missing, unreadable, empty, not UTF-8, has a header only, a repeated column name, or a
            line whose number of fields differs from the header's (the line is named).
    """
    check_exists(path, "data")
    text = _decoded(path)
    rows = _csv_rows(text, path.name) if path.suffix.lower() == ".csv" else _tsv_rows(text)
    if not rows:
        raise DataError(f"{path}: the file is empty; expected a header line and one sample a line")
    header = [name.strip() for name in rows[0][1]]
    if len(header) == 1 and len(rows) > 1:
        _check_separator(path, header[0])
    if len(set(header)) < len(header):
        twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
        raise DataError(f"{path}: line 1 names a column more than once: {listed(twice)}; give each column its own name")
    if len(rows) == 1:
        raise DataError(f"{path}: the file holds a header only ({listed(header)}) and no sample")
    for line, fields in rows:
        if len(fields) != len(header):
            raise DataError(
                f"{path}: line {line} has {counted(len(fields), 'field')}, the header has {len(header)} "
                f"({listed(header)}); "
                + (
                    "a field with a comma, quote or line break needs quotes"
                    if path.suffix.lower() == ".csv"
                    else "in a .tsv no field may hold a tab"
                )
            )
    columns = dict(zip(header, map(list, zip(*(fields for _, fields in rows[1:]), strict=True)), strict=True))
    return Table(path.name, columns, [line for line, _ in rows[1:]])


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not content.strip():
        raise DataError(f"{path}: the file is empty; expected a header line and one sample a line")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: the file is UTF-16; expected UTF-8: save it again as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8, "
            f"or convert it: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}: line {line} holds a NUL byte; this is not a text table")
    return text


def _tsv_rows(text: str) -> list[tuple[int, list[str]]]:
    # str.splitlines would also cut at U+2028, form feeds and the like, which may stand inside a text.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]


def _csv_rows(text: str, name: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                rows.append((begin, fields))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}: the record that begins at line {begin} is not valid CSV: {error}; "
            f'check its quotes (a quote inside a quoted field is written "")'
        ) from None
    return rows


def _check_separator(path: Path, header: str) -> None:
    expected = "comma" if path.suffix.lower() == ".csv" else "tab"
    for separator, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
        if separator in header:
            raise DataError(
                f"{path}: line 1 holds no {expected} but {word}; a {path.suffix} file is {expected} separated: "
                f"convert it"
            )


def frame_table(frame: Any, name: str) -> Table:
    """A `Table` of a DataFrame (pandas, polars, ...: anything with `.columns` and columns that NumPy can read).

    Raises:
        DataError: it has no row, or a column name twice.
    """
    names = [str(column) for column in frame.columns]
    if len(set(names)) < len(names):
        raise DataError(f"{name}: the table names a column more than once: {listed(names)}")
    columns = {str(column): _column(frame[column]) for column in frame.columns}
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{name}: the table is empty")
    dtypes = {str(column): str(getattr(frame[column], "dtype", "")).lower() for column in frame.columns}
    words = frozenset(column for column, dtype in dtypes.items() if dtype.startswith(("category", "categorical")))
    return Table(name, columns, categories=words)


def mapping_table(columns: Mapping[Any, Any], name: str) -> Table:
    """A `Table` of a dict of columns: lists or arrays, or single values for one row.

    Raises:
        DataError: no column, no row, or columns of different lengths.
    """
    listed_columns = {str(key): _column(value if _is_column(value) else [value]) for key, value in columns.items()}
    lengths = {key: len(values) for key, values in listed_columns.items()}
    if len(set(lengths.values())) > 1:
        first = next(iter(lengths))
        other = next(key for key in lengths if lengths[key] != lengths[first])
        raise DataError(
            f"{name}: the column {first!r} has {counted(lengths[first], 'row')}, {other!r} has {lengths[other]}; "
            f"give columns of one length"
        )
    if not lengths or not next(iter(lengths.values())):
        raise DataError(f"{name}: the table is empty")
    return Table(name, listed_columns)


def _is_column(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def _column(column: Any) -> Any:
    values = column.to_numpy() if hasattr(column, "to_numpy") else column
    if isinstance(values, list | tuple):
        plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        values = np.asarray(values, dtype=None if plain else object)
    values = np.asarray(values)
    if values.dtype.kind in "iufb":
        return values
    if values.dtype.kind in "mM":
        return ["" if value == "NaT" else value for value in values.astype(str).tolist()]
    return ["" if _is_missing(value) else str(value) for value in values.tolist()]


def _is_missing(value: Any) -> bool:
    """None, pandas' NA and NaT, and NaN, the only number that differs from itself."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or bool(value != value)


def find_columns(
    table: Table, kind: Kind | None, text_column: str | None, label_column: str | None, label_required: bool
) -> tuple[str | None, str | None]:
    """The names of the text column (None: a numeric feature table) and of the label column (None: there is none).

    Columns are matched by name, without case; a table of two columns without such names is (text, label).

    Raises:
        DataError: a column is missing; the message lists the columns and the mend.
    """
    names = list(table.columns)
    if text_column is not None:
        text_column = _named(table, text_column, "text_column")
    if label_column is not None and (label_required or label_column in names):
        label: str | None = _named(table, label_column, "label_column")
    else:
        label = _first([name for name in names if name != text_column], LABEL_NAMES)
    text = text_column
    if text is None and kind != "array":
        text = _find_text(table, kind, label)
    if label is None and len(names) == 2 and label_required:
        label = names[0] if text == names[1] else names[1]
    if label == text and label is not None:
        raise DataError(
            f"{table.name}: the text and the label are the same column {label!r}; "
            f"name the other by text_column= or label_column="
        )
    if label is None and label_required:
        raise DataError(
            f"{table.name}: no label column found: it has {listed(names, 12)}, expected one of "
            f"{listed(LABEL_NAMES, 12)}; "
            f"name it with label_column="
        )
    if text is None and kind == "text":
        raise DataError(
            f"{table.name}: no text column found: it has {listed(names, 12)}, expected one of {listed(TEXT_NAMES)}; "
            f"name it with text_column="
        )
    return text, label


def _find_text(table: Table, kind: Kind | None, label: str | None) -> str | None:
    others = [name for name in table.columns if name != label]
    named = _first(others, TEXT_NAMES)
    if named is not None and (kind == "text" or not is_numeric(table.columns[named])):
        return named
    candidates = others[:1] if label is None and len(others) == 2 else others
    if len(candidates) == 1 and (kind == "text" or not is_numeric(table.columns[candidates[0]])):
        return candidates[0]
    return None


def _named(table: Table, name: str, argument: str) -> str:
    if name in table.columns:
        return name
    names = list(table.columns)
    raise DataError(
        f"{argument}={name!r}: {table.name} has no such column; it has {listed(names, 12)}{nearest(name, names)}"
    )


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[name] for name in wanted if name in lowered), None)
