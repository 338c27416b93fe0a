"""Metrics and predictions of anything that holds a model: a module, a result, the folder of a run, an ONNX file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pyft.data.raw import Raw
from pyft.data.reading import is_dataset
from pyft.errors import ConfigError, MissingExtraError
from pyft.evaluation.metrics import Metrics
from pyft.export.run import CPU, OnnxModel

if TYPE_CHECKING:
    from torch import nn

    from pyft.result import Result

    Model: TypeAlias = nn.Module | Result | str | os.PathLike[str]

Backend = Literal["auto", "torch", "onnx"]


def evaluate(
    model: Model,
    data: Any,
    *,
    task: str = "auto",
    preprocess: Any = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    text_column: str | None = None,
    label_column: str | None = None,
    backend: Backend = "auto",
    provider: str = CPU,
) -> Metrics:
    """Accuracy, precision, recall, F1 per class and macro, and the confusion matrix; or RMSE, MAE and R2.

    Args:
        model: a module, a `Result`, the folder of a run, or a .onnx file.
        data: one labelled set, as `finetune` takes it.
        task: kind and problem; needed where neither the model nor the data tells.
        preprocess: as for `finetune`; default: what the run or the file keeps.
        classes: label names in the order of the model's outputs; default: what the run or the file keeps, for a module
            the sorted labels of `data`.
        batch_size: samples at a time.
        text_column, label_column: names of the columns of a table.
        backend: "torch", "onnx" (the exported file of a run), or "auto": torch where the model is there or can be
            built, else onnx.
        provider: the onnxruntime execution provider of an ONNX file; another is never used in its place.

    An ONNX file needs NumPy and onnxruntime, not torch, and gives an `Evaluation`: `Metrics` with the speed. See
    `pyft.onnx_runtime`.

    Raises:
        DataError: the data cannot be used; a label that `classes` lacks is named.
        ConfigError: what the model does not keep (preprocess, classes, task) was not given, or does not fit.
        ExportError: the ONNX file is missing or damaged.
    """
    file = _opened(model, preprocess, backend, provider)
    if file is None or _needs_torch(data, file):
        torch_way = _torch_way()
        subject = torch_way.open_subject(model, task, preprocess, classes, backend, provider)
        return torch_way.evaluate_subject(subject, data, batch_size, text_column, label_column)
    from pyft import onnx_runtime

    return onnx_runtime.evaluate(
        file, _read(data, file, text_column, label_column, True), task=task, preprocess=preprocess, classes=classes,
        batch_size=batch_size, text_column=text_column, label_column=label_column,
    )  # fmt: skip


def predict(
    model: Model,
    raw: Any,
    *,
    task: str = "auto",
    preprocess: Any = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    text_column: str | None = None,
    backend: Backend = "auto",
    provider: str = CPU,
) -> list[dict[str, Any]]:
    """Predictions for raw samples, in their order.

    Args:
        raw: a text or a list of texts; a table, or a dict of its columns (a single value for each gives one row); an
            image file, a folder of images, a list of paths or PIL images; an array or tensor (N, ...). Labels are
            ignored.
        Others as for `evaluate`.

    Returns:
        One dict per sample. Classification: label, index, score (probability), scores (C,) float32 probabilities.
        Multilabel: labels (those with a probability above 0.5), scores (C,). Regression: value, a float, or (K,).

    Raises:
        As `evaluate`.
    """
    file = _opened(model, preprocess, backend, provider)
    if file is None or _needs_torch(raw, file):
        torch_way = _torch_way()
        subject = torch_way.open_subject(model, task, preprocess, classes, backend, provider)
        return torch_way.predict_subject(subject, raw, batch_size, text_column)
    from pyft import onnx_runtime

    return onnx_runtime.predict(
        file, _read(raw, file, text_column, None, False), task=task, preprocess=preprocess, classes=classes,
        batch_size=batch_size, text_column=text_column,
    )  # fmt: skip


def _torch_way() -> ModuleType:
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError(
            "a model that is not a .onnx file needs the package 'torch', which is not installed: pip install torch, or "
            "give a .onnx file, for which onnxruntime is enough"
        )
    return importlib.import_module("pyft.subject")


def _opened(model: Any, preprocess: Any, backend: Backend, provider: str) -> OnnxModel | None:
    """The ONNX file that is run; None where torch runs, or where a function of the user's makes its inputs."""
    if backend not in ("auto", "torch", "onnx"):
        raise ConfigError(f"backend={backend!r}: expected 'auto', 'torch' or 'onnx'")
    path = _onnx_path(model, backend)
    if path is None and provider != CPU:
        raise ConfigError(f"provider={provider!r}: torch runs this model; give the .onnx file, or backend='onnx'")
    own = preprocess if preprocess is not None else getattr(model, "preprocess", None)
    is_function = own is not None and not isinstance(own, Mapping) and not callable(getattr(own, "spec", None))
    return None if path is None or is_function else OnnxModel(path, provider=provider)


def _onnx_path(model: Any, backend: Backend) -> Path | None:
    if hasattr(model, "run_dir") and hasattr(model, "onnx"):
        return model.onnx if backend == "onnx" else None
    if not isinstance(model, str | os.PathLike):
        return None
    path = Path(model)
    if path.suffix == ".onnx":
        if backend == "torch":
            raise ConfigError(f"backend='torch': {path} is run by onnxruntime; give the folder of the run")
        return path
    exported = path / "model.onnx"
    if backend == "torch" or not exported.is_file():
        return None
    return exported if backend == "onnx" or not _torch_can_build(path) else None


def _torch_can_build(path: Path) -> bool:
    """Whether torch is there and the model of the run can be built; what is no run is told by those who open it."""
    if importlib.util.find_spec("torch") is None:
        return False
    from pyft.run_dir import can_build, is_run

    return not is_run(path) or can_build(path)


def _needs_torch(data: Any, file: OnnxModel) -> bool:
    """A Dataset may give what no array holds; torch then makes the batches of a file that takes tensors."""
    return file.meta.inputs_form == "tensor" and _is_torch_data(data)


def _is_torch_data(data: Any) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.utils.data.DataLoader | torch.utils.data.IterableDataset):
        return True
    return not isinstance(data, list | Raw) and is_dataset(data)


def _read(data: Any, file: OnnxModel, text_column: str | None, label_column: str | None, labelled: bool) -> Any:
    """The samples of a Dataset; other data as it came."""
    if not _is_torch_data(data):
        return data
    from pyft.data.sources import read_source

    kind: Any = file.meta.kind or None
    return read_source(data, kind, text_column, label_column, labels_required=labelled)
