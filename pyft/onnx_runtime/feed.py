"""From raw samples to what an exported file takes: pictures, texts, tables and arrays, without torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.data.cells import MISSING, TRUTH
from pyft.data.features import feature_matrix
from pyft.data.pairs import as_array
from pyft.data.pictures import cropped_pixels, normalised, upright
from pyft.data.raw import listed, nearest
from pyft.data.table_rows import TableRows
from pyft.data.tables import Table
from pyft.data.text import TextPreprocess, gather_rows
from pyft.errors import ConfigError, DataError
from pyft.export.run import OnnxModel, OnnxValue

HELD_BYTES = 2**26
"""Pictures that wait for others of their size; above this the largest group goes, however few it has."""

THREADS = 4
ENCODED = 4096
"""Texts that are tokenised at a time."""

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, eq=False)
class Feed:
    """What one run of the file takes.

    Attributes:
        inputs: input name to array (B, ...).
        index: (B,) int64 numbers of the samples.
    """

    inputs: dict[str, NDArray[Any]]
    index: NDArray[np.int64]


def feeds(model: OnnxModel, raw: Any, *, batch_size: int = 64) -> Iterator[Feed]:
    """The samples in batches that `model.run` takes, made by what the file says of its inputs.

    Pictures of one size share a batch where the file takes them as they are; texts are sorted by length. So batches do
    not follow the order of the samples: `Feed.index` tells it. One batch is in memory at a time, with up to 64 MB of
    pictures that wait.

    Args:
        model: the file.
        raw: list of N texts; list of N paths, PIL images or uint8 arrays (H, W, 3); dict of column name to N values,
            or `TableRows`; array (N, ...) of numbers.
        batch_size: samples at a time; fewer where sizes differ.

    Raises:
        ConfigError: the file does not say how such samples become its inputs.
        DataError: a sample cannot be read, or a column is missing.
        MissingExtraError: Pillow or tokenizers is not installed.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r}: expected a whole number of 1 or more")
    if isinstance(raw, str | bytes):
        raise ConfigError("raw: expected a list of samples, got one text; give [text]")
    if isinstance(raw, TableRows):
        raw = raw.columns
    if isinstance(raw, Mapping):
        return _column_feeds(model, raw, int(batch_size))
    if not hasattr(raw, "__len__"):
        raise ConfigError(f"raw: expected a list, an array or a dict of columns, got {type(raw).__name__}")
    if not len(raw):
        return iter(())
    return _maker(model, raw)(model, raw, int(batch_size))


def _maker(model: OnnxModel, raw: Any) -> Callable[[OnnxModel, Any, int], Iterator[Feed]]:
    is_numbers = hasattr(raw, "dtype") and getattr(raw.dtype, "kind", "f") not in "OUS"
    is_pictures = is_numbers and str(raw.dtype) == "uint8" and raw.ndim == 4 and raw.shape[3] == 3
    kind = model.meta.kind or ("array" if is_numbers else "")
    if model.meta.inputs_form == "strings":
        return _string_feeds
    if kind == "text" and not is_numbers:
        return _token_feeds
    if kind == "image" and model.meta.inputs_form == "raw":
        return _picture_feeds
    if kind == "image" and (is_pictures or not is_numbers):
        return _pixel_feeds
    if is_numbers or kind == "array":
        return _array_feeds
    raise ConfigError(
        f"{_named(model)} does not say what it takes, as files made by pyft do; give an array (N, ...), or a dict with "
        f"the inputs {', '.join(value.name for value in model.inputs)}"
    )


def _named(model: OnnxModel) -> str:
    return "the ONNX model" if model.path is None else str(model.path)


def _spec(model: OnnxModel, kind: str) -> dict[str, Any]:
    """The preprocessing that the file keeps."""
    spec = model.meta.preprocess
    if spec is None or spec.get("kind") != kind:
        why = "keeps no preprocessing" if spec is None else f"keeps a preprocessing of kind {spec.get('kind')!r}"
        raise ConfigError(f"preprocess: {_named(model)} {why}, so it can be fed with a dict or array of numbers only")
    return spec


def _slices(count: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, count, batch_size):
        yield np.arange(start, min(start + batch_size, count))


# ---------------------------------------------------------------- arrays


def _array_feeds(model: OnnxModel, raw: Any, batch_size: int) -> Iterator[Feed]:
    value = _only_input(model)
    for index in _slices(len(raw), batch_size):
        yield Feed({value.name: _as_input(value, as_array(raw[index[0] : index[-1] + 1]))}, index)


def _only_input(model: OnnxModel) -> OnnxValue:
    if len(model.inputs) > 1:
        names = ", ".join(value.name for value in model.inputs)
        raise ConfigError(f"{_named(model)} takes the inputs {names}; give a dict with these, got one array or list")
    return model.inputs[0]


def _as_input(value: OnnxValue, array: NDArray[Any]) -> NDArray[Any]:
    """Floating point in the width that the file takes; whole numbers are left as they are."""
    return array.astype(value.dtype, copy=False) if array.dtype.kind == value.dtype.kind == "f" else array


# ---------------------------------------------------------------- columns


def _column_feeds(model: OnnxModel, raw: Mapping[Any, Any], batch_size: int) -> Iterator[Feed]:
    columns = {str(name): values for name, values in raw.items()}
    names = [value.name for value in model.inputs]
    known = model.meta.columns
    if known is not None and not set(names) <= set(columns) and len(names) == 1:
        _check_columns(model, columns, known)
        table = Table("data", {name: _cells(columns[name]) for name in known})
        matrix = feature_matrix(table, model.meta.preprocess)
        return _array_feeds(model, matrix, batch_size) if len(matrix) else iter(())
    _check_columns(model, columns, names)
    return _input_feeds(model, columns, batch_size)


def _check_columns(model: OnnxModel, columns: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(
            f"data: {_named(model)} takes {'the column' if len(missing) == 1 else 'the columns'} {listed(missing)}, "
            f"which is missing{nearest(missing[0], list(columns))}; got {listed(list(columns), 12)}"
        )
    sizes = {name: len(columns[name]) for name in names}
    if len(set(sizes.values())) > 1:
        raise DataError(f"data: columns must have one length, got {', '.join(f'{n}: {s}' for n, s in sizes.items())}")


def _input_feeds(model: OnnxModel, columns: Mapping[str, Any], batch_size: int) -> Iterator[Feed]:
    for index in _slices(len(columns[model.inputs[0].name]), batch_size):
        first, last = int(index[0]), int(index[-1]) + 1
        yield Feed({v.name: _column_part(v, columns[v.name][first:last], first) for v in model.inputs}, index)


def _column_part(value: OnnxValue, cells: Any, first: int) -> NDArray[Any]:
    """(B,) of a named column, or (B, ...) of any other input; a missing number is NaN, a missing word "".

    Args:
        first: number of the first row, for messages.
    """
    if value.dtype == np.object_:
        # Blanks are a word like any other, as in training.
        words = ["" if cell is None or cell != cell else str(cell) for cell in _cells(cells)]
        return np.array(words, dtype=np.object_)
    if len(value.shape) == 1 and value.dtype.kind == "f":
        cells = _cells(cells)
        array = cells if _is_number_array(cells) else _numbers(value.name, cells, first)
        return array.astype(value.dtype)
    return _as_input(value, as_array(cells))


def _numbers(name: str, cells: Sequence[Any], first: int) -> NDArray[np.float64]:
    numbers = np.full(len(cells), np.nan)
    for row, cell in enumerate(cells):
        text = str(cell).strip().lower()
        if _is_missing(cell) or text in MISSING:
            continue
        try:
            numbers[row] = TRUTH[text] if text in TRUTH else float(cell)
        except (TypeError, ValueError):
            raise DataError(
                f"data: the column {name!r} holds {cell!r} in row {first + row}, expected a number; "
                f"leave a missing one empty"
            ) from None
    return numbers


def _is_missing(cell: Any) -> bool:
    # NaN is the only value that differs from itself; pandas writes missing text so.
    return cell is None or cell != cell


def _cells(values: Any) -> Any:
    """A column as an array of numbers, or a list."""
    if hasattr(values, "detach"):
        return as_array(values)
    values = values.to_numpy() if hasattr(values, "to_numpy") else values
    if isinstance(values, np.ndarray):
        return values if _is_number_array(values) else values.tolist()
    if all(isinstance(cell, int | float) and not isinstance(cell, str) for cell in values):
        return np.asarray(values)
    return list(values)


def _is_number_array(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind in "iufb"


# ---------------------------------------------------------------- texts


def _string_feeds(model: OnnxModel, raw: Any, batch_size: int) -> Iterator[Feed]:
    name = _only_input(model).name
    texts = list(raw)
    # Characters tell well enough which texts are long in tokens.
    order = np.argsort([len(text) for text in texts], kind="stable")
    for place in _slices(len(texts), batch_size):
        index = order[place]
        yield Feed({name: np.array([texts[row] for row in index.tolist()], dtype=np.object_)}, index)


def _token_feeds(model: OnnxModel, raw: Any, batch_size: int) -> Iterator[Feed]:
    preprocess = TextPreprocess.from_spec(_spec(model, "text"))
    names = [value.name for value in model.inputs]
    if "input_ids" not in names or not set(names) <= set(TOKEN_INPUTS):
        raise ConfigError(f"{_named(model)} takes the inputs {', '.join(names)}, which texts cannot be made into")
    flat, offsets = _encoded(preprocess, list(raw))
    order = np.argsort(np.diff(offsets), kind="stable")
    for place in _slices(len(order), batch_size):
        rows = gather_rows(flat, offsets, order[place], preprocess.pad_id)
        rows["token_type_ids"] = np.zeros_like(rows["input_ids"])
        yield Feed({name: rows[name] for name in names}, order[place])


def _encoded(preprocess: TextPreprocess, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """As `encode_flat`, some texts at a time: the tokenizer gives kilobytes for each, of which the numbers are kept."""
    parts = [preprocess.encode_flat(texts[start : start + ENCODED]) for start in range(0, len(texts), ENCODED)]
    lengths = np.concatenate([np.diff(offsets) for _, offsets in parts])
    return np.concatenate([flat for flat, _ in parts]), np.concatenate([[0], np.cumsum(lengths)])


# ---------------------------------------------------------------- pictures


def _pixel_feeds(model: OnnxModel, raw: Any, batch_size: int) -> Iterator[Feed]:
    """Resized, cropped and scaled here, for a file that takes tensors."""
    spec, name = _spec(model, "image"), _only_input(model).name

    def pixels(image: Any) -> NDArray[np.uint8]:
        return cropped_pixels(image, spec["size"], spec["resize"], spec["interpolation"])

    decoded = _ahead(raw, pixels)
    for index in _slices(len(raw), batch_size):
        batch = np.stack([next(decoded) for _ in index])
        yield Feed({name: normalised(batch, spec["mean"], spec["std"], spec["scale"])}, index)


def _picture_feeds(model: OnnxModel, raw: Any, batch_size: int) -> Iterator[Feed]:
    """As they are, for a file that resizes them itself."""
    name = _only_input(model).name
    waiting: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}
    held = 0
    for number, pixels in enumerate(_ahead(raw, _whole_picture)):
        waiting.setdefault(pixels.shape, []).append((number, pixels))
        held += pixels.nbytes
        shape = pixels.shape
        if len(waiting[shape]) < batch_size:
            if held <= HELD_BYTES:
                continue
            shape = max(waiting, key=lambda shape: len(waiting[shape]) * int(np.prod(shape)))
        group = waiting.pop(shape)
        held -= sum(one.nbytes for _, one in group)
        yield _picture_feed(name, group)
    for group in waiting.values():
        yield _picture_feed(name, group)


def _whole_picture(image: Any) -> NDArray[np.uint8]:
    """(H, W, 3); an array needs no Pillow."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    return np.asarray(upright(image))


def _picture_feed(name: str, group: list[tuple[int, NDArray[np.uint8]]]) -> Feed:
    return Feed({name: np.stack([pixels for _, pixels in group])}, np.array([number for number, _ in group], np.int64))


def _ahead(items: Sequence[Any], make: Callable[[Any], Any]) -> Iterator[Any]:
    """`make` of each item in order, by threads that are a few items ahead: a photo decoded is 36 MB."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="pyft-feed")
    coming: deque[Future[Any]] = deque()
    try:
        # By number: a Dataset has a length, and need not say where it ends otherwise.
        for number in range(len(items)):
            coming.append(pool.submit(make, items[number]))
            if len(coming) > 2 * THREADS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
