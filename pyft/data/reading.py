"""One set of samples read without torch: files, folders, arrays, frames and dicts of columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyft.data.features import table_samples
from pyft.data.folders import IMAGE_SUFFIXES, folder_samples
from pyft.data.pairs import is_frame, pair_arrays
from pyft.data.raw import Raw, check_exists, listed
from pyft.data.table_rows import TableForm, TableRows
from pyft.data.tables import TABLE_SUFFIXES, frame_table, mapping_table, read_table
from pyft.errors import DataError

if TYPE_CHECKING:
    from pyft.samples import Kind


ROLES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
    "testing": "test",
}


def one_set(source: Any, kind: Kind | None, ignored: bool, columns: Sequence[str] | TableForm | None) -> Any:
    """The source of one set; a lone text, which is no path, as a list.

    Args:
        ignored: labels are, so that inputs alone will do.

    Raises:
        DataError: it is several sets: a dict of them, or a folder with tables.
    """
    if isinstance(source, Mapping) and (columns is None or set(source) <= set(ROLES)):
        raise DataError(f"data: expected one set, got a dict with {listed(list(source))}; give one of its values")
    if isinstance(source, str) and ignored and kind == "text" and not _looks_like_path(source):
        return [source]
    if isinstance(source, str | os.PathLike) and Path(source).is_dir() and kind not in ("image", None):
        tables = sorted(entry.name for entry in Path(source).iterdir() if entry.suffix.lower() in TABLE_SUFFIXES)
        raise DataError(
            f"{source}: expected one set, got a folder"
            + (f" with {listed(tables)}; give one of these files" if tables else " without a table")
        )
    return source


def check_set(raw: Raw, kind: Kind, ignored: bool) -> None:
    """Refuse samples of another kind than the model takes, or without labels where these are needed.

    Raises:
        DataError: one of these.
    """
    if raw.kind != kind and not (raw.kind == "array" and kind == "image"):
        raise DataError(f"{raw.name}: holds {raw.kind} inputs, the model takes {kind} inputs")
    if raw.labels is None and not ignored:
        raise DataError(f"{raw.name}: no labels; give (X, y), or a table with a label column")


def _looks_like_path(text: str) -> bool:
    return text.lower().endswith(TABLE_SUFFIXES) or (len(text) < 4096 and "\n" not in text and Path(text).exists())


def read_arrays(
    source: Any,
    kind: Kind | None,
    text_column: str | None,
    label_column: str | None,
    *,
    labels_required: bool,
    columns: Sequence[str] | TableForm | None = None,
) -> Raw:
    """The samples of one set, labels as they came, numbers as an array; of a table the features `columns`, where known.

    Args:
        source: a path, a folder of images, (X, y), a list of (x, y), a dict of columns, a DataFrame, `TableRows`;
            without `labels_required` also X alone.
        kind: what the samples are, where that is known.
        text_column, label_column: names of columns of a table.

    Raises:
        DataError: the source cannot be read, or its type is not supported.
    """
    if isinstance(source, str | os.PathLike):
        return _path_samples(Path(source), kind, text_column, label_column, labels_required, columns)
    if isinstance(source, TableRows):
        names = TableForm.of(columns).columns or source.names
        return Raw("array", source.select(names, "the rows"), None, "the rows", columns=tuple(names))
    if isinstance(source, Mapping):
        source = mapping_table(source, "the dict")
        return table_samples(source, kind, text_column, label_column, labels_required, columns)
    if is_frame(source):
        table = frame_table(source, "DataFrame")
        return table_samples(table, kind, text_column, label_column, labels_required, columns)
    two_arrays = (
        labels_required
        and isinstance(source, list)
        and len(source) == 2
        and all(hasattr(part, "shape") for part in source)
    )
    if isinstance(source, tuple) or two_arrays:
        if len(source) != 2 or isinstance(source[0], tuple):
            raise DataError(
                f"data: expected (X, y), got a tuple of {len(source)}; "
                f"for several sets give {{'train': (X, y), 'val': (X, y)}}"
            )
        return pair_arrays(source[0], source[1], kind, columns=columns)
    return _sequence_samples(source, kind, labels_required)


def _sequence_samples(source: Any, kind: Kind | None, labels_required: bool) -> Raw:
    if is_dataset(source):
        pairs = [source[number] for number in range(len(source))]
        return pair_arrays([x for x, _ in pairs], [y for _, y in pairs], kind, "data")
    if isinstance(source, list) or hasattr(source, "shape"):
        if labels_required:
            raise DataError("data: there are no labels; give (X, y)")
        return pair_arrays(source, None, kind, "data")
    if hasattr(source, "__iter__"):
        raise DataError(
            f"data: {type(source).__name__} can only be read in a row; give a list, (X, y), or a map-style Dataset "
            f"(__len__ and __getitem__)"
        )
    raise DataError(
        f"data: got {type(source).__name__}; expected a path, a folder, (X, y), a Dataset, a DataLoader, a "
        f"DataFrame, or a dict with 'train'"
    )


def is_dataset(source: Any) -> bool:
    """Whether `source` gives (x, y) by number: a list of pairs, or a map-style Dataset."""
    if isinstance(source, list):
        return bool(source) and all(isinstance(item, tuple) and len(item) == 2 for item in source)
    if isinstance(source, str | tuple | Mapping | TableRows) or hasattr(source, "shape") or is_frame(source):
        return False
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def in_form(raw: Raw, columns: Sequence[str] | TableForm | None) -> Raw:
    """The same samples, as raw columns where the model takes these.

    Raises:
        DataError: they are numbers without names, and the model takes words.
    """
    form = TableForm.of(columns)
    if form.raw and raw.kind == "array" and not isinstance(raw.inputs, TableRows):
        if form.words:
            raise DataError(
                f"{raw.name}: holds numbers without names, the model takes words in {listed(form.words)}; give a table"
            )
        raw.inputs = TableRows.from_matrix(raw.inputs, form.columns, raw.name)
        raw.columns = raw.inputs.names
    return raw


def _path_samples(
    path: Path,
    kind: Kind | None,
    text_column: str | None,
    label_column: str | None,
    labels_required: bool,
    columns: Sequence[str] | TableForm | None,
) -> Raw:
    check_exists(path, "data")
    if path.is_dir():
        if kind not in (None, "image"):
            raise DataError(
                f"{path}: this task needs a .tsv or .csv file, or a folder with train.tsv; this folder has none"
            )
        return folder_samples(path, labels_required=labels_required)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return table_samples(read_table(path), kind, text_column, label_column, labels_required, columns)
    if path.suffix.lower() in IMAGE_SUFFIXES and not labels_required:
        return Raw("image", [path], None, path.name)
    raise DataError(
        f"{path}: expected a .tsv or .csv file, or a folder; got a file named {path.suffix or 'without a suffix'}; "
        f"rename or convert it"
    )
