"""Metrics, speed and predictions of an exported file, streaming."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.data.raw import Raw
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.table_rows import TableRows
from pyft.data.targets import make_targets
from pyft.data.task import parse_task
from pyft.data.unusable import check_finite
from pyft.errors import ConfigError
from pyft.evaluation.metrics import Metrics, make_counter
from pyft.evaluation.rows import prediction_rows
from pyft.export.run import CPU, OnnxModel
from pyft.onnx_runtime.feed import feeds
from pyft.onnx_runtime.samples import read_set, take
from pyft.onnx_runtime.speed import Speed, Stopwatch, single_latency
from pyft.samples import Kind, Problem
from pyft.target_scale import TargetScale

SINGLE_SAMPLES = 32

Model = str | os.PathLike[str] | OnnxModel


@dataclass(frozen=True, eq=False)
class Evaluation(Metrics):
    """The metrics of a file, and how fast it ran; printed as a short table.

    Attributes:
        speed: throughput and latency.
        Others as for `Metrics`.
    """

    speed: Speed | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `Metrics.to_dict`, with `speed`."""
        return {**super().to_dict(), "speed": None if self.speed is None else self.speed.to_dict()}

    def __str__(self) -> str:
        return super().__str__() + (f"\n\n{self.speed}" if self.speed is not None else "")


def load(path: Model, *, provider: str = CPU, threads: int | None = None) -> OnnxModel:
    """Open an exported file.

    Args:
        path: a .onnx file, or the folder of a run, which holds model.onnx.
        provider: the onnxruntime execution provider; another is never used in its place.
        threads: threads within an operator; default: all CPUs, or as torch has where it is imported.

    Raises:
        ExportError: there is no such file, it is damaged, or the provider is not there or does not start.
        MissingExtraError: onnxruntime is not installed.
    """
    if isinstance(path, OnnxModel):
        return path
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path: expected a .onnx file or the folder of a run, got {type(path).__name__}")
    file = Path(path)
    return OnnxModel(file / "model.onnx" if file.is_dir() else file, provider=provider, threads=threads)


def evaluate(
    path: Model,
    data: Any,
    *,
    task: str = "auto",
    preprocess: Any = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    text_column: str | None = None,
    label_column: str | None = None,
    provider: str = CPU,
    threads: int | None = None,
    single_samples: int = SINGLE_SAMPLES,
) -> Evaluation:
    """Metrics, throughput and latency of an exported file on labelled data; outputs are counted batch by batch.

    Args:
        path: a .onnx file, the folder of a run, or what `load` gave; provider and threads are then those of `load`.
        data: a .tsv, .csv or .npz file; a folder of images by class; (X, y) of arrays, texts, paths or pictures; a dict
            of columns; a DataFrame.
        task, classes, preprocess: needed where the file does not say; `preprocess` is a spec, or an object with one.
        batch_size: samples at a time.
        text_column, label_column: names of columns of a table.
        provider: the onnxruntime execution provider; another is never used in its place.
        threads: threads within an operator.
        single_samples: samples that are run one by one for the latency, after the metrics; 0: none.

    Raises:
        DataError: the data cannot be used; a label that the classes lack is named.
        ConfigError: what the file does not say was not given, or does not fit.
        ExportError: the file is missing or damaged, or the provider does not run.
        MissingExtraError: a package that the inputs need (Pillow, tokenizers) is not installed.
    """
    subject = open_file(path, task, preprocess, classes, provider, threads)
    raw = read_set(
        data, subject.model.meta, subject.kind, text_column=text_column, label_column=label_column, labelled=True
    )
    subject, targets = subject.with_labels(raw)
    subject.tell_surprises(raw)
    counter = make_counter(subject.problem or "classification", subject.classes)
    watch = Stopwatch(subject.model)
    for logits, index in subject.answers(raw.inputs, batch_size, watch):
        counter.update(targets[index], logits)
    metrics = counter.metrics()
    singles = None
    speed = watch.speed(batch_size, None)
    if single_samples:
        numbers = np.unique(np.linspace(0, len(raw) - 1, min(single_samples, len(raw))).astype(np.int64)).tolist()
        singles = single_latency(subject.model, take(raw.inputs, numbers), subject.output)
    return Evaluation(**vars(metrics), speed=replace(speed, single_ms=singles))


def predict(
    path: Model,
    raw: Any,
    *,
    task: str = "auto",
    preprocess: Any = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    text_column: str | None = None,
    provider: str = CPU,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Predictions of an exported file for raw samples, in their order.

    Args:
        raw: a text or a list of texts; a table or a dict of columns; an image file, a folder of images, a list of
            paths, PIL images or uint8 arrays (H, W, 3); an array (N, ...), or a .npy file of one. Labels are ignored.
        Others as for `evaluate`.

    Returns:
        As `pyft.predict`: one dict per sample.

    Raises:
        As `evaluate`.
    """
    subject = open_file(path, task, preprocess, classes, provider, threads)
    if isinstance(raw, list | tuple) and not raw:
        return []
    if hasattr(raw, "convert") and hasattr(raw, "mode"):
        raw = [raw]
    found = read_set(raw, subject.model.meta, subject.kind, text_column=text_column, labelled=False)
    subject.tell_surprises(found)
    problem = subject.problem or "classification"
    answers = subject.answers(found.inputs, batch_size, None)
    return prediction_rows(answers, len(found), problem, subject.classes if problem != "regression" else None)


# ---------------------------------------------------------------- what is run


@dataclass(frozen=True)
class File:
    """An opened file with what it says, or what was given in its place.

    Attributes:
        kind, problem, classes: None where they are not known.
        output: name of the output that holds logits, or the value in its own unit.
        unscale: makes values of outputs that are scaled targets; None: they are values.
    """

    model: OnnxModel
    kind: Kind | None
    problem: Problem | None
    classes: list[str] | None
    output: str
    unscale: Callable[[Any], Any] | None = None

    def with_labels(self, raw: Raw) -> tuple[File, NDArray[Any]]:
        """The targets of the samples, and the file with what they tell of problem and classes."""
        known = self.classes if self.problem != "regression" else None
        targets = make_targets(raw, self.problem, known)
        check_finite(targets.values, raw.name, "target")
        found = self if self.problem is not None else _with_problem(self, targets.problem)
        classes = found.classes if found.classes is not None else targets.classes
        return replace(found, classes=classes if found.problem != "regression" else None), targets.values

    def answers(
        self, inputs: Any, batch_size: int, watch: Stopwatch | None
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Logits, or values in their own unit, and sample numbers of each batch.

        Raises:
            ConfigError: the outputs do not fit the classes.
        """
        watch = watch or Stopwatch(self.model)
        for feed in feeds(self.model, inputs, batch_size=batch_size):
            logits = watch.run(feed, self.output)
            if logits.shape[:1] != (len(feed.index),):
                raise ConfigError(f"the output '{self.output}' has shape {logits.shape} for {len(feed.index)} samples")
            if self.classes is not None and self.problem != "regression" and logits.shape[1:] != (len(self.classes),):
                raise ConfigError(
                    f"classes: {len(self.classes)} names for outputs of shape {logits.shape}; give classes= with one "
                    "name per output, in the order of the outputs"
                )
            logits = logits.astype(np.float32) if logits.dtype == np.float16 else logits
            yield self.unscale(logits) if self.unscale is not None else logits, feed.index

    def tell_surprises(self, raw: Raw) -> None:
        """Warn of words of a table that training has not seen."""
        spec = self.model.meta.preprocess
        if isinstance(raw.inputs, TableRows) and spec is not None and spec.get("kind") == "table":
            for line in TablePreprocess.from_spec(spec).surprises(raw.inputs, raw.name):
                warnings.warn(line, UserWarning, stacklevel=3)


def open_file(
    path: Model, task: str, preprocess: Any, classes: Sequence[str] | None, provider: str, threads: int | None
) -> File:
    """The file, with what the user gave in the place of what it says."""
    model = load(path, provider=provider, threads=threads)
    if preprocess is not None:
        model = copy.copy(model)
        model.meta = replace(model.meta, preprocess=_spec_of(preprocess))
    elif (model.meta.preprocess or {}).get("kind") == "callable":
        raise ConfigError(
            f"preprocess: {model.path or 'the file'} was made with a preprocess function, which no file keeps: give "
            "the function or object used in training"
        )
    if model.meta.task.rpartition("-")[2] == "detection":
        raise ConfigError(
            f"{model.path or 'the file'} finds boxes, of which no metrics are taken: give its inputs to "
            "pyft.onnx_runtime.load(path).run(...)"
        )
    said_kind, said_problem = parse_task(model.meta.task or "auto")
    kind, problem = parse_task(task)
    kind = kind or model.meta.kind or said_kind  # type: ignore[assignment]
    known = list(classes) if classes is not None else model.meta.classes
    file = File(model, kind, None, known, model.output)
    problem = problem or said_problem
    return file if problem is None else _with_problem(file, problem)


def _with_problem(file: File, problem: Problem) -> File:
    """Regression is judged in the targets' unit: that of the output `value`, or of the unscaled logits."""
    if problem != "regression":
        return replace(file, problem=problem)
    if any(value.name == "value" for value in file.model.outputs):
        return replace(file, problem=problem, output="value")
    scale = file.model.meta.target_scale
    unscale = None if scale is None else TargetScale.from_dict(scale).unscale
    return replace(file, problem=problem, unscale=unscale)


def _spec_of(preprocess: Any) -> dict[str, Any]:
    if isinstance(preprocess, Mapping):
        return dict(preprocess)
    if callable(getattr(preprocess, "spec", None)):
        return preprocess.spec()
    raise ConfigError(
        f"preprocess: expected a spec or an object with spec(), got {type(preprocess).__name__}; for a function of "
        "your own use pyft.evaluate, which needs torch"
    )
