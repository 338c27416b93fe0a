"""What an ONNX file gives beside logits: scores, label indexes and names, values. Do they say what the logits say?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import ExportError
from pyft.export.comparison import relative_difference, scores_of
from pyft.export.run import OnnxModel

OWN_OUTPUTS = ("scores", "label_index", "label", "value")
SCORE_TOLERANCE = 1e-5
"""A softmax in float32 of the same logits in float32 is well within this."""


def own_outputs(model: OnnxModel) -> tuple[str, ...]:
    """The outputs beside the logits that the file has and this module can check."""
    there = {value.name for value in getattr(model, "outputs", ())}
    return tuple(name for name in OWN_OUTPUTS if name in there)


def outputs_differ(
    given: dict[str, NDArray[Any]],
    expected: NDArray[Any],
    index: NDArray[Any],
    *,
    problem: str,
    classes: Sequence[str] | None,
    to_value: Callable[[NDArray[Any]], NDArray[Any]] | None,
    tolerance: float,
) -> str | None:
    """The first output of a batch that says something else than the logits; None when all fit.

    Args:
        given: "logits" and the outputs of `own_outputs`, all with first dimension B.
        expected: (B, ...) logits of PyTorch.
        index: (B,) sample numbers.
        problem: as of `check_parity`.
        classes: names in the order of the logits.
        to_value: from PyTorch's logits to values in the original unit; None: they are.
        tolerance: relative, of `value`.
    """
    logits = given["logits"]
    checks: dict[str, Callable[[NDArray[Any]], NDArray[np.bool_]]] = {
        "scores": lambda found: np.abs(found - scores_of(logits, problem)) > SCORE_TOLERANCE,
        "label_index": lambda found: _wrong_index(found, logits, problem),
        "label": lambda found: found.astype(str) != _names(classes, given.get("label_index"), logits, problem),
        "value": lambda found: _wrong_value(found, expected if to_value is None else to_value(expected), tolerance),
    }
    indexes = logits.shape if problem == "multilabel" else logits.shape[:-1]
    wanted_shape = {"scores": logits.shape, "label_index": indexes, "label": indexes}
    for name, found in given.items():
        if name == "logits":
            continue
        if name in wanted_shape and found.shape != wanted_shape[name]:
            return f"the output '{name}' has shape {found.shape}, expected {wanted_shape[name]}"
        if name == "label" and classes is None:
            return "the output 'label' gives names, but the file carries no classes to hold them against"
        wrong = checks[name](found)
        if wrong.any():
            row = int(wrong.reshape(len(index), -1).any(axis=1).argmax())
            return _told(name, row, given, int(index[row]), classes)
    return None


def _wrong_index(found: NDArray[Any], logits: NDArray[Any], problem: str) -> NDArray[np.bool_]:
    if found.dtype != np.int64:
        raise ExportError(f"the output 'label_index' is {found.dtype}, expected int64")
    if problem == "multilabel":
        return found != (logits > 0)
    inside = (found >= 0) & (found < logits.shape[-1])
    picked = np.take_along_axis(logits, np.where(inside, found, 0)[..., None], axis=-1)[..., 0]
    # Any of several equal largest logits is right.
    return ~inside | (picked != logits.max(axis=-1))


def _names(
    classes: Sequence[str] | None, index: NDArray[Any] | None, logits: NDArray[Any], problem: str
) -> NDArray[Any]:
    assert classes is not None
    chosen = logits.argmax(axis=-1) if index is None else index
    return np.array([str(name) for name in classes])[np.clip(chosen, 0, len(classes) - 1)]


def _wrong_value(found: NDArray[Any], wanted: NDArray[Any], tolerance: float) -> NDArray[np.bool_]:
    if found.size != wanted.size:
        raise ExportError(f"the output 'value' has shape {found.shape}, expected {wanted.shape}")
    found, wanted = (np.asarray(x, np.float64).reshape(len(wanted), -1) for x in (found, wanted))
    scale = max(1.0, relative_difference(wanted, 0 * wanted)) * float(np.abs(wanted).max(initial=0))
    return ~(np.abs(found - wanted) <= tolerance * scale)


def _told(name: str, row: int, given: dict[str, NDArray[Any]], sample: int, classes: Sequence[str] | None) -> str:
    found = given[name][row]
    if name == "label" and classes is not None:
        index = given["label_index"][row] if "label_index" in given else given["logits"][row].argmax(axis=-1)
        meant = np.array([str(label) for label in classes])[np.clip(index, 0, len(classes) - 1)]
        return (
            f"the output 'label' names {_short(found)} for sample {sample}, where index {_short(index)} stands for "
            f"{_short(meant)}: the labels are permuted"
        )
    logits = given["logits"][row]
    return f"the output '{name}' is {_short(found)} for sample {sample}, whose logits are {_short(logits)}"


def _short(value: Any) -> str:
    text = repr(np.asarray(value).tolist())
    return text if len(text) <= 60 else text[:57] + "..."
