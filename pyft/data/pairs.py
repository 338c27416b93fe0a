"""In-memory inputs in NumPy alone: arrays, tensors, frames, lists of texts, paths or pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyft.data.features import feature_samples
from pyft.data.folders import IMAGE_SUFFIXES
from pyft.data.pictures import is_picture
from pyft.data.raw import Raw, counted, listed
from pyft.data.table_rows import TableForm
from pyft.data.tables import frame_table
from pyft.errors import DataError

if TYPE_CHECKING:
    from pyft.samples import Kind


def as_array(value: Any) -> NDArray[Any]:
    """Numbers as an array: real numbers float32, whole numbers int64, bool and uint8 float32; Tensors are taken, too.

    uint8 holds pictures, hence float; wider integers are token or category numbers for an embedding.

    Raises:
        DataError: complex numbers, or no numbers.

    >>> as_array([1, 2]).dtype.name, as_array([0.5]).dtype.name
    ('int64', 'float32')
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        value = (value.float() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind == "c":
        raise DataError("complex numbers are not supported; give real and imaginary part as two features")
    if array.dtype.kind not in "iufb":
        raise DataError(
            f"expected numbers, got an array of dtype {array.dtype}; convert it, for instance with .astype('float32')"
        )
    whole = array.dtype.kind in "iu" and array.dtype != np.uint8
    # A value beyond float32 becomes infinite, which the checks of inputs tell.
    with np.errstate(over="ignore"):
        return array.astype(np.int64 if whole else np.float32, copy=False)


def is_frame(value: Any) -> bool:
    """Whether `value` is a DataFrame of pandas, polars or another library."""
    return hasattr(value, "columns") and (hasattr(value, "to_numpy") or hasattr(value, "__dataframe__"))


def pair_arrays(
    x: Any, y: Any, kind: Kind | None, name: str = "X", columns: Sequence[str] | TableForm | None = None
) -> Raw:
    """Inputs `x` with labels `y` (None: no labels), numbers as an array (see `as_array`).

    A DataFrame `x` gives features by name, `columns` where known.

    Raises:
        DataError: `x` is empty, an object array, of rows of different shapes, not numbers, or as long as `y` is not.
    """
    notes: list[str] = []
    names = None
    # A frame of whole numbers only holds token or category numbers, as an array of them does.
    if is_frame(x) and kind in (None, "array") and not _all_whole(x):
        table = feature_samples(frame_table(x, name), columns)
        found, inputs, notes, names = table.kind, table.inputs, table.notes, table.columns
    else:
        found, inputs = _inputs(x, kind, name, notes)
    if not len(inputs):
        raise DataError(f"{name}: there is no sample in it")
    if y is not None and (not hasattr(y, "__len__") or getattr(y, "ndim", 1) == 0):
        raise DataError(f"y: expected {len(inputs)} labels, got one {type(y).__name__}")
    if y is not None and len(y) != len(inputs):
        raise DataError(
            f"{name} and y: {name} has {counted(len(inputs), 'sample')}, y has {counted(len(y), 'label')}; "
            f"each sample needs one label"
        )
    if kind is not None and kind != found and not (found == "array" and kind in ("text", "image")):
        raise DataError(
            f"{name}: the task or model takes {kind} inputs, but {name} holds {_described(found)}; "
            f"give {kind} inputs, or leave task='auto' where a model is tuned"
        )
    return Raw(found, inputs, y, name, notes=notes, columns=names)


def _all_whole(frame: Any) -> bool:
    return all(getattr(getattr(frame[name], "dtype", None), "kind", "") in "iu" for name in frame.columns)


def _described(kind: Kind) -> str:
    return {"text": "texts", "image": "pictures", "array": "numbers"}[kind]


def _inputs(x: Any, kind: Kind | None, name: str, notes: list[str]) -> tuple[Kind, Any]:
    if hasattr(x, "detach"):
        return "array", _whole_array(x, name, notes)
    if hasattr(x, "toarray") and hasattr(x, "nnz"):
        raise DataError(f"{name}: sparse matrices are not supported; pass {name}.toarray()")
    if hasattr(x, "to_numpy"):
        x = x.to_numpy()
    if isinstance(x, np.ndarray) and x.dtype.kind not in "OU":
        return "array", _whole_array(x, name, notes)
    if isinstance(x, np.ndarray) and x.ndim != 1:
        raise DataError(
            f"{name}: an object array of shape {x.shape} holds no numbers; "
            f"pass X.astype('float32') if all cells are numbers, else encode the others"
        )
    if not isinstance(x, Sequence | np.ndarray) or isinstance(x, str | bytes):
        raise DataError(
            f"{name}: expected an array, tensor, or list of texts, paths or pictures; got {type(x).__name__}"
        )
    return _listed_inputs(x.tolist() if isinstance(x, np.ndarray) else list(x), kind, name, notes)


def _listed_inputs(items: list[Any], kind: Kind | None, name: str, notes: list[str]) -> tuple[Kind, Any]:
    if items and all(isinstance(item, str) for item in items):
        paths = kind == "image" or (kind is None and all(item.lower().endswith(IMAGE_SUFFIXES) for item in items))
        return ("image", _existing([Path(item) for item in items], name)) if paths else ("text", items)
    if items and all(isinstance(item, Path) for item in items):
        return "image", _existing(items, name)
    if items and all(is_picture(item) for item in items):
        return "image", items
    first_type = type(items[0]).__name__ if items else "nothing"
    other = next((row for row, item in enumerate(items) if type(item).__name__ != first_type), None)
    if other is not None and any(isinstance(item, str | Path) or item is None or is_picture(item) for item in items):
        raise DataError(
            f"{name}: row {other} is {type(items[other]).__name__}, row 0 is {first_type}; "
            f"expected one type for all samples"
        )
    return "array", _whole_array(_stacked(items, name), name, notes)


def _existing(paths: list[Path], name: str) -> list[Path]:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {counted(len(paths), 'image file')} missing: {listed(missing, 3)} "
            f"(looked in {Path.cwd()})"
        )
    return paths


def _stacked(items: list[Any], name: str) -> Any:
    try:
        if items and hasattr(items[0], "detach"):
            return np.stack([as_array(item) for item in items])
        return np.asarray(items)
    except (ValueError, TypeError, RuntimeError):
        raise DataError(
            f"{name}: the rows have different shapes or hold no numbers ({_shapes(items)}); "
            f"pad or crop them to one shape"
        ) from None


def _shapes(items: list[Any]) -> str:
    shapes = [tuple(np.shape(item)) for item in items if hasattr(item, "shape")]
    if not shapes:
        lengths = [len(item) for item in items if hasattr(item, "__len__")]
        return f"lengths {listed(sorted(set(lengths)))}" if lengths else f"of type {type(items[0]).__name__}"
    return f"shapes {listed(list(dict.fromkeys(shapes)), 3)}"


def _whole_array(x: Any, name: str, notes: list[str]) -> NDArray[Any]:
    if x.ndim == 0:
        raise DataError(f"{name}: expected (N, ...) with one row per sample, got a single number")
    try:
        array = as_array(x)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    beyond = int((np.isinf(array) & ~_was_infinite(x)).sum()) if array.dtype.kind == "f" and _is_double(x) else 0
    if beyond:
        raise DataError(f"{name}: {counted(beyond, 'value')} beyond float32's 3.4e38; scale the column")
    if str(x.dtype).endswith("uint8"):
        notes.append(f"{name} is uint8: the model is given float32 values 0 to 255; pass {name} / 255 for 0 to 1")
    if array.ndim == 4 and array.shape[-1] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        notes.append(
            f"{name} has shape {array.shape}, channels last; "
            f"torch's convolutions expect (N, C, H, W): {name}.transpose(0, 3, 1, 2)"
        )
    return array


def _is_double(x: Any) -> bool:
    return str(x.dtype).endswith("float64") or str(x.dtype).startswith(("float128", "longdouble"))


def _was_infinite(x: Any) -> NDArray[np.bool_]:
    return np.isinf(x.detach().cpu().numpy() if hasattr(x, "detach") else x)
