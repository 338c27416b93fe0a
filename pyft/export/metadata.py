"""The metadata entries of an ONNX file: what the caller says of the model, and what the model says of itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyft.errors import ConfigError, need
from pyft.export.shapes import FreeDims, Inputs
from pyft.version import __version__

FORMAT = "2"
PROBLEMS = ("classification", "multilabel", "regression", "detection")
KINDS = {"text": "text", "image": "image", "tabular": "array", "table": "array", "array": "array"}

RESERVED = {
    *("pyft.format", "pyft.version", "pyft.task", "pyft.kind", "pyft.classes", "pyft.preprocess", "pyft.target_scale"),
    *("pyft.inputs", "pyft.inputs_form", "pyft.outputs", "pyft.notes", "pyft.precision"),
    *("pyft.detection", "torch.version", "onnx.version", "transformers.version", "pillow.version"),
}


def resolve(
    task: str | None,
    kind: str | None,
    classes: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None,
    inputs: Inputs,
) -> tuple[str, str]:
    """The problem ("" when not known) and the kind of a model's task.

    Raises:
        ConfigError: a word that is neither.
    """
    front, _, problem = (task or "").rpartition("-")
    if task and (problem not in PROBLEMS or (front and front not in KINDS)):
        raise ConfigError(f"task must be one of {', '.join(PROBLEMS)}, or as in 'text-classification', got {task!r}")
    if not task and classes is not None:
        problem = "classification"
    named = kind or (preprocess or {}).get("kind") or front
    if named and named not in KINDS and (kind or front):
        raise ConfigError(f"kind must be 'text', 'image' or 'array', got {named!r}")
    return problem, KINDS[named] if named in KINDS else _guess_kind(inputs)


def _guess_kind(inputs: Inputs) -> str:
    if "input_ids" in inputs:
        return "text"
    first = next(iter(inputs.values()))
    return "image" if first.ndim == 4 and first.shape[1] in (1, 3, 4) else "array"


def given_entries(
    problem: str,
    kind: str,
    classes: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
) -> dict[str, str]:
    """The entries that the caller gives.

    Raises:
        ConfigError: an entry that pyft writes itself, or that is not JSON-able.
    """
    entries = {"pyft.task": problem, "pyft.kind": kind}
    if classes is not None:
        entries["pyft.classes"] = dumps([str(name) for name in classes])
    if preprocess is not None:
        entries["pyft.preprocess"] = dumps(dict(preprocess), "preprocess")
    for key, value in (metadata or {}).items():
        if key in RESERVED:
            raise ConfigError(f"metadata: pyft writes {key!r} itself: choose another key")
        entries[key] = value if isinstance(value, str) else dumps(value)
    return entries


def found_entries(model: torch.nn.Module, proto: Any, free: FreeDims, form: str, kind: str) -> dict[str, str]:
    """The entries that the model, the graph and this machine give. No time and no path: same model, same bytes."""
    entries = {
        "pyft.format": FORMAT,
        "pyft.version": __version__,
        "pyft.inputs": dumps([_described(value) for value in proto.graph.input]),
        "pyft.inputs_form": form,
        "pyft.outputs": dumps([_described(value) for value in proto.graph.output]),
        "pyft.notes": dumps(free.notes),
        "pyft.precision": "fp32",
        "torch.version": str(torch.__version__),
        "onnx.version": need("onnx", "onnx", "exporting to ONNX").__version__,
    }
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        entries["transformers.version"] = sys.modules["transformers"].__version__
    if form == "raw" and kind == "image":
        entries["pillow.version"] = need("PIL", "image", "writing its resize into the graph").__version__
    return entries


def dumps(value: Any, argument: str = "metadata") -> str:
    """JSON text.

    Raises:
        ConfigError: the value has no such form.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{argument} must be JSON-able: {error}") from None


def _described(value: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    numpy_type = need("onnx.helper", "onnx", "exporting to ONNX").tensor_dtype_to_np_dtype(tensor.elem_type)
    return {
        "name": value.name,
        "dtype": "string" if numpy_type.kind == "O" else str(numpy_type),
        "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    }
