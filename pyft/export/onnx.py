"""Write a model as one ONNX file that carries its labels and has been run before it appears."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyft.core.files import write_atomic
from pyft.errors import ConfigError, ExportError, need
from pyft.export.parity import BATCH_SIZES, check_parity
from pyft.export.run import OnnxModel, first_line
from pyft.export.shapes import (
    FreeDims,
    Inputs,
    check_batches,
    find_free_dims,
    named_inputs,
    other_length,
    take_rows,
    with_length,
)
from pyft.export.trace import Caller, check_graph, clean, trace
from pyft.samples import Batch
from pyft.target_scale import TargetScale
from pyft.version import __version__

FORMAT = "1"
PROBLEMS = ("classification", "multilabel", "regression")
KINDS = {"text": "text", "image": "image", "tabular": "array", "array": "array"}

MAX_BYTES = 2**31 - 2**20
"""A protobuf message, and so one ONNX file, holds less than 2 GiB."""

VERIFY_BATCH = 8

RESERVED = {
    *("pyft.format", "pyft.version", "pyft.task", "pyft.kind", "pyft.classes", "pyft.preprocess"),
    *("pyft.inputs", "pyft.outputs", "pyft.notes", "torch.version", "onnx.version", "transformers.version"),
}


def export_onnx(
    model: torch.nn.Module,
    example: torch.Tensor | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    task: str | None = None,
    kind: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    opset: int | None = None,
) -> Path:
    """Export a model to one ONNX file, after running it in onnxruntime in batches of 1, 2 and 7 against PyTorch.

    The model is exported in eval mode; every module's mode is put back afterwards, and random number generators are
    left as they were. The batch size is free. The length of token inputs (B, T) and of sequences (B, T, F) is free
    where the model allows it; where not, a warning and the entry `pyft.notes` of the file say so. The same model and
    example give the same bytes.

    Args:
        model: float32 weights; called as `model(x)`, or `model(**inputs)` when `example` is a dict. Gives logits
            (B, ...) as a Tensor, as `.logits`, or first in a tuple.
        example: Tensor (B, ...) or dict of Tensors, B >= 1: a real batch. Inputs of the file get the names of the
            dict, or "input"; the output is "logits".
        path: where to write; appears whole or not at all.
        classes: names in the order of the last dimension of the logits.
        task: "classification", "multilabel", "regression", also with a kind in front ("text-classification").
            Default: "classification" where there are classes, else not recorded.
        kind: "text", "image" or "array"; default: from `preprocess`, `task` or the example.
        preprocess: JSON-able spec of what turns raw inputs into `example`.
        metadata: further entries, text or JSON-able.
        opset: ONNX operator set; default: the one that torch recommends.

    Returns:
        The path.

    Raises:
        ExportError: the model cannot be traced with a free batch size, is too large for one file, or the file
            does not behave like the model.
        ConfigError: an argument does not fit.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    onnx = need("onnx", "onnx", "exporting to ONNX")
    need("onnxscript", "onnx", "exporting to ONNX")
    need("onnxruntime", "onnx", "checking the exported ONNX file")
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"path must be a file, got the folder {path}: name the file, as in {path / 'model.onnx'}")
    _check_weights(model)
    device = next((p.device for p in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    inputs = {name: value.detach().to(device) for name, value in named_inputs(example).items()}
    problem, kind = _resolve(task, kind, classes, preprocess, inputs)
    given = _given_entries(problem, kind, classes, preprocess, metadata)
    with _eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        caller = Caller(model, list(inputs) if isinstance(example, Mapping) else None).eval()
        logits = check_batches(caller, inputs, BATCH_SIZES)
        _check_classes(classes, logits)
        proto, free = trace(caller, inputs, find_free_dims(caller, inputs), opset)
        clean(proto)
        check_graph(proto)
        for key, value in sorted({**_found_entries(model, proto, free, onnx.__version__), **given}.items()):
            proto.metadata_props.add(key=key, value=value)
        content = _serialize(onnx, proto)
        _verify(caller, content, inputs, free)
    for note in free.notes:
        warnings.warn(f"{path.name}: {note}", UserWarning, stacklevel=2)
    return write_atomic(path, lambda file: file.write(content))


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for all modules, then each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        if modes[model]:
            model.train()
        for module, mode in modes.items():
            module.training = mode


def _check_weights(model: torch.nn.Module) -> None:
    size = 0
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and value.element_size() < 4:
            raise ConfigError(
                f"model: '{name}' is {value.dtype}; ONNX export takes float32 weights: call model.float() first"
            )
        size += value.numel() * value.element_size()
    if size > MAX_BYTES:
        raise ExportError(
            f"the model holds {size / 2**30:.2f} GiB of weights, and one ONNX file holds less than "
            f"{MAX_BYTES / 2**30:.2f} GiB: export a smaller model"
        )


def _resolve(
    task: str | None,
    kind: str | None,
    classes: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None,
    inputs: Inputs,
) -> tuple[str, str]:
    """The problem ("" when not known) and the kind."""
    front, _, problem = (task or "").rpartition("-")
    if task and (problem not in PROBLEMS or (front and front not in KINDS)):
        raise ConfigError(f"task must be one of {', '.join(PROBLEMS)}, or as in 'text-classification', got {task!r}")
    if not task and classes is not None:
        problem = "classification"
    named = kind or (preprocess or {}).get("kind") or front
    if named and named not in KINDS:
        raise ConfigError(f"kind must be 'text', 'image' or 'array', got {named!r}")
    return problem, KINDS[named] if named else _guess_kind(inputs)


def _guess_kind(inputs: Inputs) -> str:
    if "input_ids" in inputs:
        return "text"
    first = next(iter(inputs.values()))
    return "image" if first.ndim == 4 and first.shape[1] in (1, 3, 4) else "array"


def _check_classes(classes: Sequence[str] | None, logits: torch.Tensor) -> None:
    if classes is not None and (logits.ndim < 2 or logits.shape[-1] != len(classes)):
        raise ConfigError(f"classes holds {len(classes)} names, but the model gives logits {tuple(logits.shape)}")


def _given_entries(
    problem: str,
    kind: str,
    classes: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
) -> dict[str, str]:
    """The metadata that the caller gives."""
    entries = {"pyft.task": problem, "pyft.kind": kind}
    if classes is not None:
        entries["pyft.classes"] = _dumps([str(name) for name in classes])
    if preprocess is not None:
        entries["pyft.preprocess"] = _dumps(dict(preprocess), "preprocess")
    for key, value in (metadata or {}).items():
        if key in RESERVED:
            raise ConfigError(f"metadata: pyft writes {key!r} itself: choose another key")
        entries[key] = value if isinstance(value, str) else _dumps(value)
    return entries


def run_metadata(run: str, columns: Sequence[str] | None, scale: TargetScale | None = None) -> dict[str, Any]:
    """What `metadata` says of a run: its name, the table columns that the model takes, the unit of its outputs."""
    entries: dict[str, Any] = {"pyft.run": run}
    if columns is not None:
        entries["pyft.columns"] = list(columns)
    if scale is not None:
        entries["pyft.target_scale"] = scale.to_dict()
    return entries


def _found_entries(model: torch.nn.Module, proto: Any, free: FreeDims, onnx_version: str) -> dict[str, str]:
    """The metadata that the model, the graph and this machine give. No time and no path: same model, same bytes."""
    entries = {
        "pyft.format": FORMAT,
        "pyft.version": __version__,
        "pyft.inputs": _dumps([_described(value) for value in proto.graph.input]),
        "pyft.outputs": _dumps([_described(value) for value in proto.graph.output]),
        "pyft.notes": _dumps(free.notes),
        "torch.version": str(torch.__version__),
        "onnx.version": onnx_version,
    }
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        entries["transformers.version"] = sys.modules["transformers"].__version__
    return entries


def _dumps(value: Any, argument: str = "metadata") -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{argument} must be JSON-able: {error}") from None


def _described(value: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    numpy_type = need("onnx.helper", "onnx", "exporting to ONNX").tensor_dtype_to_np_dtype(tensor.elem_type)
    return {
        "name": value.name,
        "dtype": str(numpy_type),
        "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    }


def _serialize(onnx: Any, proto: Any) -> bytes:
    size = proto.ByteSize()
    if size > MAX_BYTES:
        raise ExportError(
            f"the ONNX graph takes {size / 2**30:.2f} GiB, and one file holds less than {MAX_BYTES / 2**30:.2f} GiB: "
            "export a smaller model"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(f"the exported graph is not valid ONNX: {first_line(error)}") from error
    return proto.SerializeToString(deterministic=True)


def _verify(caller: Caller, content: bytes, inputs: Inputs, free: FreeDims) -> None:
    """Run the file on the example in batches of 1, 2, 7 and more, and with other lengths."""
    variants = [inputs]
    for group in free.lengths():
        name, dim = next(iter(group.items()))
        variants.append(with_length(inputs, group, other_length(inputs[name].shape[dim])))
    lone = caller.names is None
    batches = []
    for variant in variants:
        rows = take_rows(variant, max(VERIFY_BATCH, *BATCH_SIZES))
        batch = rows["input"] if lone else rows
        batches.append(Batch(batch, None, torch.arange(len(next(iter(rows.values()))))))
    parity = check_parity(
        lambda batch: caller(*([batch] if lone else batch.values())),
        OnnxModel(content),
        batches,
        problem="regression",
        raises=False,
    )
    if not parity.passed:
        raise ExportError(f"the exported graph does not behave like the model on the example: {parity.failure}")
