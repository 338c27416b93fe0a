"""Any model in the form in which torch evaluates it: a module, a result, the folder of a run, an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyft.data.batches import Batches
from pyft.data.checks import check_samples
from pyft.data.sources import load_data, load_samples, read_source
from pyft.data.task import parse_task
from pyft.errors import ConfigError, ExportError
from pyft.evaluate import Backend
from pyft.evaluation.metrics import Metrics
from pyft.evaluation.predict import evaluate_batches, predict_logits
from pyft.evaluation.rows import prediction_rows
from pyft.export.run import CPU, OnnxModel
from pyft.job import to_device
from pyft.models.call import call_model, probing
from pyft.preprocess import preprocess_of, table_form, tell_surprises
from pyft.result import Result
from pyft.run_dir import can_build, is_run, open_run
from pyft.samples import Kind, Problem, Samples
from pyft.target_scale import TargetScale

Model = nn.Module | Result | str | os.PathLike[str]


def evaluate_subject(
    subject: Subject, data: Any, batch_size: int, text_column: str | None, label_column: str | None
) -> Metrics:
    """As `pyft.evaluate`, of an opened model."""
    if isinstance(data, Mapping) and subject.columns is None:
        raise ConfigError(f"data: expected one set, got a dict of {', '.join(map(str, data))}; give one of its values")
    subject, samples = labelled(subject, data, text_column, label_column)
    check_samples(samples, samples.name)
    tell_surprises(subject.preprocess, samples)
    batches = Batches(samples, subject.preprocess, batch_size, shuffle=False)
    with subject.quiet():
        check_width(subject, samples, batches)
        return evaluate_batches(subject.call, batches.epoch(0), subject.problem or "classification", subject.classes)


def predict_subject(subject: Subject, raw: Any, batch_size: int, text_column: str | None) -> list[dict[str, Any]]:
    """As `pyft.predict`, of an opened model."""
    if isinstance(raw, (list, tuple)) and not raw:
        return []
    if _is_single_picture(raw):
        raw = [raw]
    kind = subject.kind or read_source(raw, None, text_column, None, labels_required=False).kind
    known = subject.classes if subject.problem != "regression" else None
    samples = load_samples(
        raw, kind=kind, problem="classification", classes=known, text_column=text_column, labels="ignored",
        columns=table_form(subject.columns, subject.preprocess),
    )  # fmt: skip
    check_samples(samples, samples.name)
    tell_surprises(subject.preprocess, samples)
    subject = replace(subject, kind=kind, preprocess=_checked_preprocess(subject, kind))
    batches = Batches(samples, subject.preprocess, batch_size, shuffle=False)
    with subject.quiet():
        found = predict_logits(subject.call, batches.epoch(0))
        answers = ((one.logits, one.index) for one in found)
        return prediction_rows(answers, len(samples), subject.problem or "classification", subject.classes)


def _is_single_picture(raw: Any) -> bool:
    return hasattr(raw, "convert") and hasattr(raw, "mode")


# ---------------------------------------------------------------- what is evaluated


@dataclass(frozen=True)
class Subject:
    """A model in the form in which it is evaluated.

    Attributes:
        call: gives logits from `Batch.inputs`; for regression values in the unit of the targets.
        name: for messages.
        kind, problem, classes, preprocess: None where the model does not keep them.
        module: the module behind `call`, None for an ONNX file.
        needs_preprocess: the model was made with a function that no file keeps.
        columns: names of the table columns that the model takes, in its order; None where it was not tuned on a table.
    """

    call: Callable[[Any], Any]
    name: str
    kind: Kind | None
    problem: Problem | None
    classes: list[str] | None
    preprocess: Any
    module: nn.Module | None = None
    needs_preprocess: bool = False
    columns: tuple[str, ...] | None = None

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Eval mode inside, and the module's own modes afterwards."""
        with nullcontext() if self.module is None else probing(self.module):
            yield


def open_subject(
    model: Model, task: str, preprocess: Any, classes: Sequence[str] | None, backend: Backend, provider: str = CPU
) -> Subject:
    """Whatever the user calls a model, with what he gave taking the place of what it keeps."""
    if backend not in ("auto", "torch", "onnx"):
        raise ConfigError(f"backend={backend!r}: expected 'auto', 'torch' or 'onnx'")
    subject = _open(model, backend, provider)
    kind, problem = parse_task(task)
    if isinstance(preprocess, Mapping):
        preprocess = preprocess_of(preprocess)
    return replace(
        subject,
        kind=kind or subject.kind,
        problem=problem or subject.problem,
        classes=list(classes) if classes is not None else subject.classes,
        preprocess=preprocess if preprocess is not None else subject.preprocess,
    )


def _open(model: Model, backend: Backend, provider: str) -> Subject:
    if isinstance(model, Result):
        if backend != "onnx":
            subject = _module_subject(
                model.model, "the result", model.kind, model.problem, model.classes, model.preprocess
            )
            return replace(in_own_unit(subject, model.target_scale), columns=model.columns)
        if model.onnx is None:
            raise ConfigError("backend='onnx': the run was not exported; tune with export='onnx'")
        return replace(_onnx_subject(model.onnx, provider), preprocess=model.preprocess)
    if isinstance(model, nn.Module):
        if backend == "onnx":
            raise ConfigError("backend='onnx': a module is run by torch; give the .onnx file")
        return _module_subject(model, type(model).__name__, None, None, None, None)
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError(
            f"model: expected a module, a Result, the folder of a run or a .onnx file, got {type(model).__name__}"
        )
    return _open_path(Path(model), backend, provider)


def _open_path(path: Path, backend: Backend, provider: str) -> Subject:
    if path.suffix == ".onnx":
        if backend == "torch":
            raise ConfigError(f"backend='torch': {path} is run by onnxruntime; give the folder of the run")
        return _onnx_subject(path, provider)
    if not is_run(path):
        what = "is not the folder of a run" if path.exists() else "does not exist"
        raise ConfigError(f"model: {path} {what}; expected a module, a Result, the folder of a run or a .onnx file")
    exported = path / "model.onnx"
    if backend == "onnx" or (backend == "auto" and not can_build(path) and exported.is_file()):
        if not exported.is_file():
            raise ExportError(f"backend='onnx': there is no {exported}; the run was not exported")
        return _onnx_subject(exported, provider)
    run = open_run(path)
    subject = _module_subject(run.module, str(path), run.kind, run.problem, run.classes, run.preprocess)
    columns = run.config["data"].get("columns")
    return replace(
        in_own_unit(subject, run.target_scale),
        needs_preprocess=run.preprocess is None,
        columns=None if columns is None else tuple(columns),
    )


def in_own_unit(subject: Subject, scale: TargetScale | None) -> Subject:
    """The subject with outputs in the unit of the targets."""
    if scale is None:
        return subject
    scaled = subject.call
    return replace(subject, call=lambda inputs: scale.unscale(scaled(inputs)))


def _module_subject(
    module: nn.Module, name: str, kind: Kind | None, problem: Problem | None, classes: list[str] | None, preprocess: Any
) -> Subject:
    device = next((value.device for value in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    return Subject(
        lambda inputs: call_model(module, to_device(inputs, device)), name, kind, problem, classes, preprocess, module
    )


def _onnx_subject(path: Path, provider: str) -> Subject:
    opened = OnnxModel(path, provider=provider)
    meta = opened.meta
    kind, problem = parse_task(meta.task or "auto")
    spec = meta.preprocess
    subject = Subject(
        opened,
        str(path),
        meta.kind or kind,  # type: ignore[arg-type]
        problem,
        meta.classes,
        preprocess_of(spec),
        needs_preprocess=spec is not None and spec.get("kind") == "callable",
        columns=None if meta.columns is None else tuple(meta.columns),
    )
    return in_own_unit(subject, None if meta.target_scale is None else TargetScale.from_dict(meta.target_scale))


def labelled(subject: Subject, data: Any, text_column: str | None, label_column: str | None) -> tuple[Subject, Samples]:
    """The labelled samples, and the subject with what the data had to tell: kind, problem, classes."""
    if subject.kind is None or subject.problem is None or (subject.classes is None and subject.problem != "regression"):
        words = [{"array": "tabular"}.get(subject.kind or "", subject.kind), subject.problem]
        task = "-".join(word for word in words if word) or "auto"
        form = table_form(subject.columns, subject.preprocess)
        found = load_data(data, task=task, val=0, text_column=text_column, label_column=label_column, form=form)
        classes = subject.classes if subject.classes is not None else found.classes
        subject = replace(subject, kind=found.kind, problem=found.problem, classes=classes)
        if classes == found.classes:
            return replace(subject, preprocess=_checked_preprocess(subject, found.kind)), found.train
    assert subject.kind is not None
    assert subject.problem is not None
    samples = load_samples(
        data, kind=subject.kind, problem=subject.problem, classes=subject.classes, text_column=text_column,
        label_column=label_column, columns=table_form(subject.columns, subject.preprocess),
    )  # fmt: skip
    return replace(subject, preprocess=_checked_preprocess(subject, subject.kind)), samples


def _checked_preprocess(subject: Subject, kind: Kind) -> Any:
    if subject.preprocess is None and (subject.needs_preprocess or kind != "array"):
        why = "was made with a preprocess function, which no file keeps" if subject.needs_preprocess else "keeps none"
        raise ConfigError(f"preprocess: {subject.name} {why}: give the function or object used in training")
    return subject.preprocess


def check_width(subject: Subject, samples: Samples, batches: Batches) -> None:
    """Labels and outputs must agree in number, which is told before the first metric."""
    if subject.classes is None or subject.problem == "regression":
        return
    few = Batches(samples.subset([0]), subject.preprocess, 1, shuffle=False)
    found = next(predict_logits(subject.call, few.epoch(0))).logits
    if found.ndim != 2 or found.shape[1] != len(subject.classes):
        raise ConfigError(
            f"classes: {len(subject.classes)} names for outputs of shape {tuple(found.shape)}; give classes= with one "
            "name per output, in the order of the outputs"
        )
