"""The samples of a table: texts, numbers as a matrix, or rows of numbers and words as they came. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyft.data.cells import column_numbers, column_words, is_float, is_numeric, loses_digits
from pyft.data.raw import Raw, counted, listed, nearest
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.table_rows import TableForm, TableRows, named_columns
from pyft.data.tables import LABEL_NAMES, TEXT_NAMES, Table, find_columns
from pyft.errors import DataError
from pyft.samples import Kind


def table_samples(
    table: Table,
    kind: Kind | None,
    text_column: str | None,
    label_column: str | None,
    label_required: bool,
    columns: Sequence[str] | TableForm | None = None,
) -> Raw:
    """Inputs and labels of a table: texts, a float32 array (N, columns), or `TableRows` (see `TableForm.raw`).

    Args:
        columns: the features that the model takes, in its order, where they are known; the table may hold others. Or
            a `TableForm`, which tells more.

    Raises:
        DataError: a column is missing, a text is blank, a cell holds neither a number nor a word where one is needed.
    """
    form = TableForm.of(columns)
    if kind == "image":
        raise DataError(
            f"{table.name}: a table cannot be used for an image task; give a folder of images, or (list of paths, "
            f"labels)"
        )
    _check_header(table, text_column, label_column)
    if form.columns is not None or form.raw or form.words:
        kind = "array"
    text, label = find_columns(table, kind, text_column, label_column, label_required)
    labels = None if label is None else _label_cells(table, label, label_required)
    notes = list(table.notes)
    features: dict[str, Any] = {}
    if text is not None:
        unused = [name for name in table.columns if name not in (text, label)]
        if unused:
            notes.append(f"{table.name}: text from {text!r}, label from {label!r}; not used: {listed(unused)}")
    else:
        features = _features(table, label, form, notes, label_required)
    return Raw(
        "array" if text is None else "text",
        _feature_inputs(table, features, form, notes) if text is None else _text_cells(table, text),
        labels,
        table.name,
        table.lines,
        from_table=table.lines is not None,
        notes=notes,
        columns=tuple(features) if text is None else None,
    )


def feature_samples(table: Table, columns: Sequence[str] | TableForm | None) -> Raw:
    """All columns of a table as features, without labels; as `table_samples`."""
    form, notes = TableForm.of(columns), list(table.notes)
    features = _features(table, None, form, notes, True)
    inputs = _feature_inputs(table, features, form, notes)
    return Raw("array", inputs, None, table.name, table.lines, notes=notes, columns=tuple(features))


def feature_matrix(table: Table, spec: Mapping[str, Any] | None = None) -> np.ndarray:
    """(N, F) float32 of a table of features: its numbers as they are, or what the `spec` of a TablePreprocess makes.

    Raises:
        DataError: there is no column, or a cell does not hold what its column should.
    """
    if spec is None or spec.get("kind") != "table":
        return _feature_inputs(table, table.columns, TableForm(tuple(table.columns), raw=False), [])
    preprocess = TablePreprocess.from_spec(spec)
    return preprocess.matrix(feature_samples(table, preprocess.form()).inputs)


def _features(
    table: Table, label: str | None, form: TableForm, notes: list[str], label_required: bool
) -> dict[str, Any]:
    """Name -> cells of the feature columns."""
    if form.columns is not None:
        features = named_columns(table.columns, form.columns, table.name)
        unused = [name for name in table.columns if name != label and name not in form.columns]
        if unused and label_required:
            notes.append(f"{table.name}: columns that the model does not take, not used: {listed(unused)}")
        return features
    unknown = [name for name in (*form.words, *form.leave_out) if name not in table.columns]
    if unknown:
        argument = "words" if unknown[0] in form.words else "leave_out"
        raise DataError(
            f"{argument}: {table.name} has no column {unknown[0]!r}; it has {listed(list(table.columns), 12)}"
            f"{nearest(unknown[0], list(table.columns))}"
        )
    features = {}
    for name, values in table.columns.items():
        if name == label or name in form.leave_out:
            continue
        if name not in form.words and _is_row_numbering(name, values):
            notes.append(f"{table.name}: the column {name!r} only numbers the rows and is left out")
        else:
            features[name] = values
    return features


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
    if any(name in table.columns[name] for name in names) or all(is_float(name) for name in names):
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
    if not isinstance(values, np.ndarray):
        if not all(is_float(value) for value in values):
            return False
        values = np.array([float(value) for value in values])
    return len(values) > 1 and bool((np.diff(values) > 0).all())


def _feature_inputs(table: Table, features: dict[str, Any], form: TableForm, notes: list[str]) -> Any:
    if not features:
        raise DataError(f"{table.name}: the table has no feature column besides the label")
    words = _word_columns(table, features, form)
    if words and form.raw is False:
        raise DataError(
            f"{table.name}: {len(words)} of {counted(len(features), 'feature column')} with text instead of numbers: "
            f"{listed(words)}; the model takes numbers: give them, or train on such a table, which pyft then encodes"
        )
    numbers = {
        name: column_numbers(table.name, name, values, table.where)
        for name, values in features.items()
        if name not in words
    }
    gaps = [name for name, values in numbers.items() if np.isnan(values).any()]
    if form.raw is False and gaps:
        raise _gaps_error(table, gaps[0], numbers[gaps[0]])
    if not (form.raw or words or gaps):
        return np.stack(list(numbers.values()), axis=1).astype(np.float32)
    blurred = [name for name, values in numbers.items() if loses_digits(values)]
    if blurred:
        notes.append(
            f"{table.name}: float32 blurs the numbers of {listed(blurred)}; take off a constant, or divide them by one"
        )
    if "" in features:
        raise DataError(f"{table.name}: a feature column has no name; write one into its header")
    return TableRows(
        {
            name: column_words(values) if name in words else numbers[name].astype(np.float32)
            for name, values in features.items()
        }
    )


def _word_columns(table: Table, features: dict[str, Any], form: TableForm) -> list[str]:
    """The columns of words: told by the form, declared by the source, or seen from the cells."""
    if form.columns is not None and form.raw:
        return [name for name in features if name in form.words]
    return [
        name
        for name, values in features.items()
        if name in form.words or name in table.categories or not is_numeric(values)
    ]


def _gaps_error(table: Table, name: str, numbers: np.ndarray) -> DataError:
    holes = np.flatnonzero(np.isnan(numbers))
    row = int(holes[0])
    return DataError(
        f"{table.name}: the column {name!r} is empty in {counted(len(holes), 'row')}, first at {table.where(row)}; the "
        f"model was trained on complete numbers: fill in a number, leave these rows out, or train with "
        f"preprocess='table', which fills them with the median"
    )
