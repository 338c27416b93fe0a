"""Tables of text: reading .tsv and .csv files, and finding the columns that hold inputs and labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyft.data.raw import Raw, check_exists, counted, listed, nearest
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
    """

    name: str
    columns: dict[str, Any]
    lines: list[int] | None = None
    notes: tuple[str, ...] = ()

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
    columns = {str(column): _frame_column(frame[column]) for column in frame.columns}
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{name}: the table is empty")
    return Table(name, columns)


def _frame_column(column: Any) -> Any:
    values = column.to_numpy() if hasattr(column, "to_numpy") else np.asarray(column)
    if values.dtype.kind in "iufb":
        return values
    # NaN is the only value that differs from itself; pandas writes missing text so.
    return ["" if value is None or value != value else str(value) for value in values.tolist()]


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


def is_numeric(values: Any) -> bool:
    """Whether more than half of a column's filled cells are numbers; the few others are then an error of their own."""
    if isinstance(values, np.ndarray):
        return True
    filled = [value for value in values if value.strip()]
    if _as_floats(filled) is not None:
        return True
    return sum(_is_float(value) for value in filled) * 2 > len(filled)


def _as_floats(values: list[str]) -> np.ndarray | None:
    try:
        return np.array([float(value) for value in values], dtype=np.float64)
    except ValueError:
        return None


def _is_float(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def table_samples(
    table: Table,
    kind: Kind | None,
    text_column: str | None,
    label_column: str | None,
    label_required: bool,
    columns: Sequence[str] | None = None,
) -> Raw:
    """Inputs and labels of a table: texts, or float32 features (N, columns).

    Args:
        columns: the features that the model takes, in its order, where they are known; the table may hold others.

    Raises:
        DataError: a column is missing, a text is blank, a feature column holds text, or a cell holds no number.
    """
    if kind == "image":
        raise DataError(
            f"{table.name}: a table cannot be used for an image task; give a folder of images, or (list of paths, "
            f"labels)"
        )
    _check_header(table, text_column, label_column)
    if columns is not None:
        kind = "array"
    text, label = find_columns(table, kind, text_column, label_column, label_required)
    labels = None if label is None else _label_cells(table, label, label_required)
    notes = list(table.notes)
    features: dict[str, Any] = {}
    if text is not None:
        unused = [name for name in table.columns if name not in (text, label)]
        if unused:
            notes.append(f"{table.name}: text from {text!r}, label from {label!r}; not used: {listed(unused)}")
    elif columns is not None:
        features = _named_features(table, columns)
        unused = [name for name in table.columns if name != label and name not in columns]
        if unused and label_required:
            notes.append(f"{table.name}: columns that the model does not take, not used: {listed(unused)}")
    else:
        for name, values in table.columns.items():
            if name != label and _is_row_numbering(name, values):
                notes.append(f"{table.name}: the column {name!r} only numbers the rows and is left out")
            elif name != label:
                features[name] = values
    return Raw(
        "array" if text is None else "text",
        feature_matrix(Table(table.name, features, table.lines)) if text is None else _text_cells(table, text),
        labels,
        table.name,
        table.lines,
        from_table=table.lines is not None,
        notes=notes,
        columns=tuple(features) if text is None else None,
    )


def _named_features(table: Table, columns: Sequence[str]) -> dict[str, Any]:
    """The columns that the model takes, in its order: by position they could be mixed up in silence."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(
            f"{table.name}: {counted(len(missing), 'feature column')} that the model was trained on "
            f"{'is' if len(missing) == 1 else 'are'} missing: {listed(missing)}"
            f"{nearest(missing[0], list(table.columns))}; it has {listed(list(table.columns), 12)}"
        )
    return {name: table.columns[name] for name in columns}


def _check_header(table: Table, text_column: str | None, label_column: str | None) -> None:
    """A file without a header would lose its first sample in silence."""
    names = list(table.columns)
    known = {*TEXT_NAMES, *LABEL_NAMES}
    if (
        table.lines is None
        or text_column
        or label_column
        or len(names) != 2
        or known & {name.lower() for name in names}
    ):
        return
    if any(name in table.columns[name] for name in names) or all(_is_float(name) for name in names):
        raise DataError(
            f"{table.name}: line 1 ({listed(names)}) looks like a sample, not a header; "
            f"add a header line such as 'text', 'label'"
        )


def _label_cells(table: Table, label: str, required: bool) -> Any:
    cells = table.columns[label]
    if isinstance(cells, np.ndarray):
        return cells
    cells = [cell.strip() for cell in cells]
    empty = [row for row, cell in enumerate(cells) if not cell]
    if not empty:
        return cells
    if not required:
        return None
    raise DataError(
        f"{table.name}: the label column {label!r} is empty in {counted(len(empty), 'row')}, first at "
        f"{table.where(empty[0])}; "
        f"label these rows or leave them out"
    )


def _text_cells(table: Table, text: str) -> list[str]:
    cells = table.columns[text]
    if isinstance(cells, np.ndarray):
        return [str(cell) for cell in cells.tolist()]
    empty = [row for row, cell in enumerate(cells) if not cell.strip()]
    if empty:
        raise DataError(
            f"{table.name}: the text column {text!r} is empty in {counted(len(empty), 'row')}, first at "
            f"{table.where(empty[0])}; "
            f"fill these rows or leave them out"
        )
    return cells


def _is_row_numbering(name: str, values: Any) -> bool:
    """pandas writes its index as a first column without a name (or 'Unnamed: 0'): it would leak the row order."""
    if name and not name.startswith("Unnamed:"):
        return False
    numbers = values if isinstance(values, np.ndarray) else _as_floats(values)
    return numbers is not None and len(numbers) > 1 and bool((np.diff(numbers) > 0).all())


def feature_matrix(table: Table) -> np.ndarray:
    """(N, columns) float32 of a table whose columns are all numbers.

    Raises:
        DataError: there is no column, a column holds text, or a cell holds no number.
    """
    features = table.columns
    if not features:
        raise DataError(f"{table.name}: the table has no feature column besides the label")
    words = [name for name, values in features.items() if not is_numeric(values)]
    if words:
        mend = "turn them into numbers (one 0/1 column per value, for instance) or leave them out"
        raise DataError(
            f"{table.name}: {len(words)} of {counted(len(features), 'feature column')} with text instead of numbers: "
            f"{listed(words)}; "
            f"{mend}; for a text task name one by text_column="
        )
    matrix = np.empty((table.num_rows, len(features)), dtype=np.float32)
    for position, (name, values) in enumerate(features.items()):
        matrix[:, position] = _numbers(table, name, values)
    return matrix


def _numbers(table: Table, name: str, values: Any) -> np.ndarray:
    numbers = values.astype(np.float64) if isinstance(values, np.ndarray) else _as_floats(values)
    if numbers is None:
        bad = [row for row, value in enumerate(values) if not _is_float(value)]
        empty = [row for row in bad if not values[row].strip()]
        if len(empty) == len(bad):
            what, first = f"is empty in {counted(len(empty), 'row')}", empty[0]
        else:
            what, first = f"holds {counted(len(bad), 'cell')} without a number", bad[0]
        cell = values[first]
        raise DataError(
            f"{table.name}: the column {name!r} {what}, first at {table.where(first)} ({cell!r}); "
            f"fill in a number or leave these rows out"
        )
    wild = np.flatnonzero(~np.isfinite(numbers) | (np.abs(numbers) > np.finfo(np.float32).max))
    if len(wild):
        row = int(wild[0])
        raise DataError(
            f"{table.name}: the column {name!r} holds {counted(len(wild), 'value')} NaN, infinite or "
            f"beyond float32, "
            f"first at {table.where(row)} ({numbers[row]}); fill in a number or leave these rows out"
        )
    return numbers
