"""Write a module as one ONNX file that carries its labels and has been run before it appears."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyft.errors import ConfigError, ExportError, need
from pyft.export.detection import DetectionCaller, Suppression, boxes_behind, check_boxes
from pyft.export.front import Form, front_of
from pyft.export.graph import Graph, put_before, put_behind
from pyft.export.metadata import dumps, found_entries, given_entries, resolve
from pyft.export.onnx_file import OnnxFile, store_once
from pyft.export.outputs import in_unit, outputs_of
from pyft.export.parity import BATCH_SIZES, check_parity
from pyft.export.plain_weights import plain_weights
from pyft.export.run import OnnxModel
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

VERIFY_BATCH = 8


def export_module(
    model: torch.nn.Module,
    example: torch.Tensor | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    inputs: Form = "tensor",
    classes: Sequence[str] | None = None,
    task: str | None = None,
    kind: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
    detection: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    opset: int | None = None,
) -> Path:
    """Export a model to an ONNX file, after running it in onnxruntime in batches of 1, 2 and 7 against PyTorch.

    The model is exported in eval mode; every module's mode is put back afterwards, and random number generators are
    left as they were. The batch size is free. The length of token inputs (B, T) and of sequences (B, T, F) is free
    where the model allows it; where not, a warning and the entry `pyft.notes` of the file say so. LoRA layers are
    merged and parametrisations folded on a copy. The same model and example give the same bytes.

    Args:
        model: float32 weights; called as `model(x)`, or `model(**inputs)` when `example` is a dict. Gives logits
            (B, ...) as a Tensor, as `.logits`, or first in a tuple; for detection `boxes` and `logits`.
        example: Tensor (B, ...) or dict of Tensors, B >= 1: a real batch, as the model takes it.
        path: where to write; appears whole or not at all. Weights of 2 GiB and more go to <path>.data beside it.
        inputs: "tensor": the file takes what the model takes, by the names of the dict, or "input". "raw" and
            "strings": what `preprocess` takes, see `pyft.export.front`.
        classes: names in the order of the last dimension of the logits.
        task: "classification", "multilabel", "regression" or "detection", also with a kind in front
            ("text-classification"). Default: "classification" where there are classes, else not recorded, and the
            file gives logits only.
        kind: "text", "image" or "array"; default: from `preprocess`, `task` or the example.
        preprocess: JSON-able spec of what turns raw inputs into `example`.
        target: for regression {"mean": ..., "std": ...}: the value is logits * std + mean.
        detection: for detection, see `pyft.export.detection.Suppression`.
        metadata: further entries, text or JSON-able.
        opset: ONNX operator set; default: the one that torch recommends.

    Returns:
        The path.

    Raises:
        ExportError: the model cannot be traced with a free batch size, or the file does not behave like the model.
        ConfigError: an argument does not fit.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "onnx", "exporting to ONNX")
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"path must be a file, got the folder {path}: name the file, as in {path / 'model.onnx'}")
    _check_weights(model)
    device = next((p.device for p in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    tensors = {name: value.detach().to(device) for name, value in named_inputs(example).items()}
    problem, kind = resolve(task, kind, classes, preprocess, tensors)
    given = given_entries(problem, kind, classes, preprocess, metadata)
    suppression = Suppression.of(problem, detection)
    front = front_of(inputs, preprocess, list(tensors))
    names = list(tensors) if isinstance(example, Mapping) else None
    with _eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        make = Caller if suppression is None else DetectionCaller
        caller = make(model, names).eval()
        logits = check_batches(caller.logits, tensors, BATCH_SIZES)
        _check_classes(classes, logits)
        proto, free = _traced(caller, make(plain_weights(model), names).eval(), tensors, opset)
        if front is not None:
            # Behind the front the model's own inputs cannot be fed any more.
            _verify(caller, proto, tensors, free, path)
        _join(proto, front, problem, classes, target, suppression)
        entries = {**found_entries(model, proto, free, inputs, kind), **given}
        if suppression is not None:
            entries["pyft.detection"] = dumps(suppression.to_dict())
        if target is not None:
            entries["pyft.target_scale"] = dumps(dict(target), "target")
        for key, value in sorted(entries.items()):
            proto.metadata_props.add(key=key, value=value)
        file = OnnxFile(proto, path)
        try:
            if front is None:
                _compare(caller, file.model, tensors, free, problem=problem, classes=classes, target=target)
            done = file.put()
        except BaseException:
            file.discard()
            raise
    for note in free.notes:
        warnings.warn(f"{path.name}: {note}", UserWarning, stacklevel=2)
    return done


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
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and value.element_size() < 4:
            raise ConfigError(
                f"model: '{name}' is {value.dtype}; ONNX export takes float32 weights: call model.float() first"
            )


def _check_classes(classes: Sequence[str] | None, logits: torch.Tensor) -> None:
    if classes is not None and (logits.ndim < 2 or logits.shape[-1] != len(classes)):
        raise ConfigError(f"classes holds {len(classes)} names, but the model gives logits {tuple(logits.shape)}")


def _traced(caller: Caller, plain: Caller, inputs: Inputs, opset: int | None) -> tuple[Any, FreeDims]:
    """The graph of the model alone, and its free dimensions."""
    proto, free = trace(plain, inputs, find_free_dims(caller.logits, inputs), opset)
    clean(proto)
    check_graph(proto)
    store_once(proto)
    return proto, free


def _join(
    proto: Any,
    front: Graph | None,
    problem: str,
    classes: Sequence[str] | None,
    target: Mapping[str, Any] | None,
    suppression: Suppression | None,
) -> None:
    """Put the preprocessing before the model, and scores, labels, values or boxes behind it."""
    if front is not None:
        put_before(proto, front)
    logits = next(value for value in proto.graph.output if value.name == "logits")
    shape = [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim]
    if suppression is not None:
        put_behind(proto, boxes_behind(suppression, shape, classes, front))
        return
    tail = outputs_of(problem, shape, classes, target)
    if tail is not None:
        put_behind(proto, tail)


def _verify(caller: Caller, proto: Any, inputs: Inputs, free: FreeDims, path: Path) -> None:
    """Compare the graph of the model alone, on a copy, as weights that are moved to a file leave the proto."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    file = OnnxFile(copy, path)
    try:
        _compare(caller, file.model, inputs, free)
    finally:
        file.discard()


def _compare(
    caller: Caller,
    model: OnnxModel,
    inputs: Inputs,
    free: FreeDims,
    *,
    problem: str = "",
    classes: Sequence[str] | None = None,
    target: Mapping[str, Any] | None = None,
) -> None:
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
        lambda batch: caller.logits(*([batch] if lone else batch.values())),
        model,
        batches,
        problem=problem if problem in ("classification", "multilabel") else "regression",
        classes=classes,
        to_value=None if target is None else lambda logits: in_unit(logits, target),
        raises=False,
    )
    if not parity.passed:
        raise ExportError(f"the exported graph does not behave like the model on the example: {parity.failure}")
    if isinstance(caller, DetectionCaller):
        check_boxes(caller, model, take_rows(inputs, VERIFY_BATCH))
