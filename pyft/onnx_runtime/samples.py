"""The samples and labels that an exported file is run on, read without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from pyft.data.raw import Raw, check_exists, listed
from pyft.data.reading import check_set, in_form, one_set, read_arrays
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.table_rows import TableForm, TableRows
from pyft.data.tables import LABEL_NAMES
from pyft.data.unusable import check_finite, check_texts
from pyft.errors import DataError
from pyft.export.run import OnnxMeta
from pyft.samples import Kind

INPUT_NAMES = ("x", "inputs", "input", "images", "data", "features")


def read_set(
    data: Any,
    meta: OnnxMeta,
    kind: Kind | None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    labelled: bool,
) -> Raw:
    """One set for a file, labels as they came, inputs as `feeds` takes them.

    Args:
        data: a .tsv, .csv or .npz file; a folder of images by class; (X, y); a dict of columns; a DataFrame; a `Raw`.
            Without `labelled` also X alone, a .npy file, an image file, a text.
        kind: of the inputs, where it is known.

    Raises:
        DataError: the data cannot be read, or does not fit the file.
    """
    raw = data if isinstance(data, Raw) else _read(data, meta, kind, text_column, label_column, labelled)
    check_set(raw, kind or raw.kind, not labelled)
    if not len(raw):
        raise DataError(f"{raw.name}: there is no sample in it")
    if raw.kind == "text":
        check_texts(raw.inputs, raw.name)
    elif isinstance(raw.inputs, np.ndarray):
        check_finite(raw.inputs, raw.name, "input")
    return raw


def form_of(meta: OnnxMeta) -> TableForm | None:
    """How a table is read for the file; None: all its columns, as they stand."""
    if (meta.preprocess or {}).get("kind") == "table":
        return TablePreprocess.from_spec(meta.preprocess or {}).form()
    return None if meta.columns is None else TableForm.of(meta.columns)


def take(inputs: Any, numbers: Sequence[int]) -> Any:
    """Some of the inputs of a `Raw`."""
    if isinstance(inputs, TableRows):
        return inputs.take(numbers)
    if isinstance(inputs, np.ndarray):
        return inputs[np.asarray(numbers)]
    return [inputs[number] for number in numbers]


def _read(
    data: Any, meta: OnnxMeta, kind: Kind | None, text_column: str | None, label_column: str | None, labelled: bool
) -> Raw:
    if isinstance(data, str | os.PathLike) and str(data).lower().endswith((".npz", ".npy")):
        data = _array_file(Path(data), labelled)
    if kind == "image" and (pictures := _pictures(data, labelled)) is not None:
        return pictures
    form = form_of(meta)
    # A dict of columns is one set where the columns say so; the names of sets say otherwise.
    source = one_set(data, kind, not labelled, form if form is not None else _no_columns(data))
    raw = read_arrays(source, kind, text_column, label_column, labels_required=labelled, columns=form)
    return in_form(raw, form)


def _no_columns(data: Any) -> TableForm | None:
    """What lets a dict through whose values are columns, not sets."""
    is_column = isinstance(data, Mapping) and all(not isinstance(part, tuple | os.PathLike) for part in data.values())
    return TableForm() if is_column else None


def _array_file(path: Path, labelled: bool) -> Any:
    """X of a .npy file; (X, y) of a .npz file that holds arrays of such names, else its arrays as columns."""
    check_exists(path, "data")
    try:
        # Pickled objects can run code.
        found = np.load(path, allow_pickle=False)
        arrays = {name: found[name] for name in found.files} if hasattr(found, "files") else {"": found}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"{path}: not a file of arrays of numbers or text ({error})") from None
    if not arrays:
        raise DataError(f"{path}: there is no array in it")
    if "" in arrays:
        if labelled:
            raise DataError(f"{path}: a .npy file holds no labels; give (X, y), or a .npz file with X and y")
        return arrays[""]
    lowered = {name.lower(): array for name, array in arrays.items()}
    x = next((lowered[name] for name in INPUT_NAMES if name in lowered), None)
    y = next((lowered[name] for name in LABEL_NAMES if name in lowered), None)
    if x is not None and (y is not None or not labelled):
        return (x, y) if labelled else x
    if any(array.ndim != 1 for array in arrays.values()):
        raise DataError(
            f"{path}: holds the arrays {listed(list(arrays), 12)}; expected X and y by name, or columns (N,) of a table"
        )
    return arrays


def _pictures(data: Any, labelled: bool) -> Raw | None:
    """Pictures in memory as uint8 (H, W, 3), which are no numbers to compute with."""
    is_pair = labelled and isinstance(data, tuple) and len(data) == 2
    x, y = data if is_pair else (data, None)
    many = isinstance(x, np.ndarray) and x.ndim == 4 and _is_picture(x[0] if len(x) else x)
    if not many and not (isinstance(x, list) and x and all(_is_picture(one) for one in x)):
        return None
    if y is not None and len(y) != len(x):
        raise DataError(f"X and y: X has {len(x)} pictures, y has {len(y)} labels; each picture needs one label")
    return Raw("image", list(cast(Any, x)), y, "X")


def _is_picture(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3
