"""Run an exported ONNX file with onnxruntime. Needs NumPy and onnxruntime, not torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import ConfigError, ExportError, MissingExtraError, need

CPU = "CPUExecutionProvider"
INPUTS_FORMS = ("raw", "tensor", "strings")

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}

EXTENSION_OPS = "ai.onnx.contrib"
"""The domain of onnxruntime-extensions' operators, such as tokenizers."""


@dataclass(frozen=True)
class OnnxMeta:
    """What the file says about itself; the defaults where it was not written by pyft.

    Attributes:
        task: "classification", "multilabel", "regression" or "".
        kind: "text", "image", "array" or "".
        classes: names in the order of the logits, or None.
        preprocess: the preprocessing spec (JSON object), or None.
        columns: names of the table columns behind the input's features, or None.
        target_scale: {"mean": [...], "std": [...]}, where the logits are (y - mean) / std of the targets; else None.
        notes: lines about the export, such as a dimension that had to be fixed.
        versions: package to version, of the machine that exported.
        extra: every metadata entry of the file, as text.
        inputs_form: "raw" (pictures, padded tokens, named columns as they are), "strings" (texts), or "tensor" (what
            the model takes after preprocessing; also where the file says nothing).
        precision: "fp32", "fp16" or "int8".
        weights_hash, data_hash: SHA-256 of the model's weights and fingerprint of its data, or "".
        metrics: the metrics at export, name to value, or None.
    """

    task: str = ""
    kind: str = ""
    classes: list[str] | None = None
    preprocess: dict[str, Any] | None = None
    columns: list[str] | None = None
    target_scale: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    inputs_form: str = "tensor"
    precision: str = "fp32"
    weights_hash: str = ""
    data_hash: str = ""
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True)
class OnnxValue:
    """One input or output: its name, NumPy dtype, and shape with a name for each dimension that is free."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class OnnxModel:
    """An ONNX file opened in onnxruntime; call it with inputs to get logits.

    Args:
        path: the file, or its bytes.
        provider: the onnxruntime execution provider. Another one is never used in its place.
        threads: threads within an operator; default: as torch has where it is imported, else all CPUs.

    Attributes:
        path: the file, or None when bytes were given.
        meta: OnnxMeta.
        inputs, outputs: tuples of OnnxValue.
        provider: the provider that runs.

    Raises:
        ExportError: the file is missing or damaged, or the provider is not there.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str] | bytes, *, provider: str = CPU, threads: int | None = None
    ) -> None:
        runtime = need("onnxruntime", "onnx", "running an ONNX file")
        self.path = None if isinstance(path, bytes) else Path(path)
        if self.path is not None and not self.path.is_file():
            raise ExportError(f"no ONNX file at {self.path}")
        self.session = _open(runtime, path, provider, threads)
        self.provider = provider
        self.inputs = tuple(_value(item) for item in self.session.get_inputs())
        self.outputs = tuple(_value(item) for item in self.session.get_outputs())
        self.output = next((v.name for v in self.outputs if v.name == "logits"), self.outputs[0].name)
        self.meta = read_meta(self.session.get_modelmeta().custom_metadata_map, self._named())

    def __call__(self, inputs: Any) -> NDArray[Any]:
        """The logits (B, ...) for a batch.

        Args:
            inputs: a Tensor or array where the file has one input, else a dict of them by input name. The first
                dimension is the batch. An integer is widened where that is exact; nothing else is converted.

        Raises:
            ConfigError: a name, dtype or shape that the file does not take.
            ExportError: onnxruntime failed on these inputs.
        """
        return self.run(inputs, [self.output])[self.output]

    def run(self, feed: Any, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """The outputs of the file by name.

        Args:
            feed: as for a call.
            outputs: names of those wanted; default: all.

        Raises:
            ConfigError: as for a call, or an output that the file does not give.
            ExportError: onnxruntime failed on these inputs.
        """
        there = [value.name for value in self.outputs]
        wanted = there if outputs is None else list(outputs)
        if missing := [name for name in wanted if name not in there]:
            raise ConfigError(f"{self._named()} gives the outputs {', '.join(there)}, not {', '.join(missing)}")
        feed = self._feed(feed)
        try:
            return dict(zip(wanted, self.session.run(wanted, feed), strict=True))
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feed.items())
            raise ExportError(f"{self._named()} failed in onnxruntime on {shapes}: {first_line(error)}") from error

    def _feed(self, inputs: Any) -> dict[str, NDArray[Any]]:
        if not isinstance(inputs, Mapping):
            if len(self.inputs) > 1:
                raise ConfigError(f"{self._named()} takes a dict with the inputs {_names(self.inputs)}, got one array")
            inputs = {self.inputs[0].name: inputs}
        given = set(inputs)
        wanted = {value.name for value in self.inputs}
        if given != wanted:
            raise ConfigError(
                f"{self._named()} takes the inputs {_names(self.inputs)}, got {', '.join(map(str, inputs)) or 'none'}"
            )
        feed = {value.name: _fitted(value, inputs[value.name]) for value in self.inputs}
        sizes = {array.shape[0] for array in feed.values() if array.ndim}
        if len(sizes) > 1:
            raise ConfigError(f"all inputs must have one batch size, got {sorted(sizes)}")
        return feed

    def _named(self) -> str:
        return "the ONNX model" if self.path is None else str(self.path)


def default_threads() -> int:
    """As many as torch uses where it is imported, else the CPUs that this process may use."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return torch.get_num_threads()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_meta(entries: Mapping[str, str], source: str) -> OnnxMeta:
    """The metadata entries as OnnxMeta.

    Raises:
        ExportError: an entry of pyft is not what pyft writes.
    """
    classes = _json(entries, "pyft.classes", list, source)
    columns = _json(entries, "pyft.columns", list, source)
    return OnnxMeta(
        task=entries.get("pyft.task", ""),
        kind=entries.get("pyft.kind", ""),
        classes=None if classes is None else [str(name) for name in classes],
        preprocess=_json(entries, "pyft.preprocess", dict, source),
        columns=None if columns is None else [str(name) for name in columns],
        target_scale=_json(entries, "pyft.target_scale", dict, source),
        notes=_json(entries, "pyft.notes", list, source) or [],
        versions={k.removesuffix(".version"): v for k, v in entries.items() if k.endswith(".version")},
        extra=dict(entries),
        inputs_form=_inputs_form(entries, source),
        precision=entries.get("pyft.precision", "fp32"),
        weights_hash=entries.get("pyft.weights_hash", ""),
        data_hash=entries.get("pyft.data_hash", ""),
        metrics=_json(entries, "pyft.metrics", dict, source),
    )


def _inputs_form(entries: Mapping[str, str], source: str) -> str:
    form = entries.get("pyft.inputs_form", "tensor")
    if form not in INPUTS_FORMS:
        raise ExportError(
            f"{source}: the metadata entry pyft.inputs_form is {form!r}, expected {', '.join(INPUTS_FORMS)}: the file "
            f"was made by another version of pyft ({entries.get('pyft.version', 'unknown')})"
        )
    return form


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, on one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _open(runtime: Any, path: Any, provider: str, threads: int | None) -> Any:
    there = runtime.get_available_providers()
    if provider not in there:
        raise ExportError(
            f"provider={provider!r}: onnxruntime {runtime.__version__} has no {provider} here; it has "
            f"{', '.join(there)}: give one of these, or install a package that has it (onnxruntime-gpu for CUDA)"
        )
    try:
        session = _session(runtime, path, provider, threads, extensions=False)
    except Exception as error:
        if EXTENSION_OPS not in str(error):
            raise _cannot_open(path, error) from error
        try:
            session = _session(runtime, path, provider, threads, extensions=True)
        except MissingExtraError:
            raise
        except Exception as again:
            raise _cannot_open(path, again) from again
    # onnxruntime goes on with the CPU when a provider cannot start.
    if session.get_providers()[0] != provider:
        raise ExportError(f"{provider} did not start, onnxruntime would run {', '.join(session.get_providers())}")
    session.disable_fallback()
    return session


def _session(runtime: Any, path: Any, provider: str, threads: int | None, *, extensions: bool) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = default_threads() if threads is None else threads
    if "torch" in sys.modules:
        # Spinning threads take the CPU from torch's while the two take turns: 1.5x slower on 2 cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Level 3 is errors: they come as exceptions, and warnings about its own optimiser help nobody.
    options.log_severity_level = 3
    if extensions:
        library = need("onnxruntime_extensions", "text-graph", "running a file that takes texts as strings")
        options.register_custom_ops_library(library.get_library_path())
    model = path if isinstance(path, bytes) else str(path)
    return runtime.InferenceSession(model, sess_options=options, providers=[provider])


def _cannot_open(path: Any, error: Exception) -> ExportError:
    name = "the ONNX model" if isinstance(path, bytes) else f"{path} ({os.path.getsize(path):,} bytes)"
    reason = first_line(error).rstrip(".")
    return ExportError(f"{name} cannot be opened: it is damaged, cut short or not ONNX: {reason}. Export it again")


def _fitted(value: OnnxValue, given: Any) -> NDArray[Any]:
    array = given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
    if value.dtype == np.object_:
        array = _strings(value.name, array)
    elif array.dtype != value.dtype:
        # An integer fed to a floating-point input is most often a picture that was not normalised.
        if array.dtype.kind not in "iu" or value.dtype.kind not in "iu" or not np.can_cast(array.dtype, value.dtype):
            raise ConfigError(f"input '{value.name}' must be {value.dtype}, got {array.dtype}")
        array = array.astype(value.dtype)
    fits = len(array.shape) == len(value.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(value.shape, array.shape, strict=True)
    )
    if not fits:
        raise ConfigError(f"input '{value.name}' must have shape ({_shape(value.shape)}), got ({_shape(array.shape)})")
    if array.ndim and not array.shape[0]:
        raise ConfigError(f"input '{value.name}' holds no sample: its batch size is 0")
    return np.ascontiguousarray(array)


def _strings(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "OU" or not all(isinstance(text, str) for text in array.flat):
        raise ConfigError(f"input '{name}' must be strings, got {array.dtype}")
    return array.astype(np.object_)


def _value(item: Any) -> OnnxValue:
    if item.type not in DTYPES:
        raise ExportError(f"'{item.name}' of the ONNX file is {item.type}, which pyft cannot feed or read")
    shape = tuple(size if isinstance(size, int) else str(size) for size in item.shape)
    return OnnxValue(item.name, np.dtype(DTYPES[item.type]), shape)


def _json(entries: Mapping[str, str], key: str, form: type, source: str) -> Any:
    if key not in entries:
        return None
    try:
        value = json.loads(entries[key])
    except json.JSONDecodeError as error:
        raise ExportError(f"{source}: the metadata entry {key} is not JSON: {error}. Export it again") from None
    if not isinstance(value, form):
        raise ExportError(f"{source}: the metadata entry {key} must be a JSON {form.__name__}. Export it again")
    return value


def _names(values: Sequence[OnnxValue]) -> str:
    return ", ".join(value.name for value in values)


def _shape(shape: Sequence[int | str]) -> str:
    return ", ".join(map(str, shape))
