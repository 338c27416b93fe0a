"""The proof of an exported file on a run's own samples: joins data, model, metrics and `pyft.export.parity`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyft.core.files import write_atomic, write_json
from pyft.data.batches import Batches
from pyft.errors import ExportError
from pyft.evaluation.metrics import make_counter
from pyft.evaluation.scores import to_numpy
from pyft.export.parity import Known, Parity, check_parity, finite
from pyft.export.precision import lower_precision
from pyft.export.precision_table import PrecisionTable
from pyft.export.run import OnnxModel
from pyft.models.call import call_model
from pyft.onnx_runtime.feed import Feed, feeds
from pyft.samples import Batch, Problem, Samples

BATCH_SIZE = 64
CALIBRATION_SAMPLES = 256
KEPT_BYTES = 2**28
"""Logits of an evaluation are kept for the proof while they take less than this, and batches for measuring again."""

MAIN_METRIC = {"classification": "accuracy", "multilabel": "micro_f1", "regression": "rmse"}


def prove(
    path: str | Path,
    module: nn.Module,
    samples: Samples,
    preprocess: Any,
    *,
    problem: Problem,
    classes: Sequence[str] | None,
    report: str | Path | None = None,
    known: Known | None = None,
    provider: str | None = None,
    to_value: Callable[[Any], Any] | None = None,
    precision: PrecisionTable | None = None,
    batch_size: int = BATCH_SIZE,
    raises: bool = True,
) -> Parity:
    """Compare a file with the model it came from on all of `samples`.

    The file gets what its `pyft.inputs_form` says: raw samples, or tensors. PyTorch always gets what comes out of the
    training preprocessing, so that another preprocessing inside the file is seen.

    Args:
        path: the file.
        module: the model, on the CPU.
        samples: validation samples; with targets, every metric is compared, too.
        preprocess: of the training.
        report: where to write parity.json.
        known: logits of the same samples that were computed before.
        to_value: for regression from logits to values in the unit of the targets.
        precision: of a file that `in_precision` made; its differences are told, and bounded by the table.
        batch_size: samples per batch.

    Raises:
        As `check_parity`, and as `feeds` where the file does not say how samples become its inputs.
    """
    batches = Batches(samples, preprocess, batch_size, shuffle=False)
    opened = _opened(path, provider)
    fed: Iterable[Feed] | None = None
    with_metrics = samples.targets is not None and (classes is not None or problem == "regression")
    source: Any = batches.epoch(0)
    if isinstance(opened, OnnxModel) and opened.meta.inputs_form != "tensor":
        fed = feeds(opened, raw_inputs(samples), batch_size=batch_size)
        source = lambda index: next(iter(batches.make([index], 0)))  # noqa: E731
    return check_parity(
        lambda inputs: call_model(module, inputs), opened, source, feeds=fed, problem=problem, classes=classes,
        report=report, raises=raises, provider=provider, module=module, known=known, to_value=to_value,
        precision=None if precision is None else precision.to_dict(),
        counter=(lambda: make_counter(problem, classes)) if with_metrics else None,
    )  # fmt: skip


def in_precision(
    path: str | Path,
    precision: str,
    samples: Samples,
    preprocess: Any,
    *,
    problem: Problem,
    classes: Sequence[str] | None,
    max_drop: float = 0.01,
    metric: str | None = None,
    calibration: Samples | None = None,
    to_value: Callable[[Any], Any] | None = None,
    batch_size: int = BATCH_SIZE,
) -> tuple[bytes, PrecisionTable]:
    """A float32 file in fp16 or int8, measured on all of `samples`; see `pyft.export.precision.lower_precision`.

    Args:
        path: the float32 file.
        precision: "fp16" or "int8".
        samples: validation samples with targets.
        preprocess: of the training.
        max_drop: largest drop of the metric.
        metric: default accuracy, micro_f1 or rmse (whose drop is relative).
        calibration: samples for ranges and sensitivity, of which at most 256 are used; default: of `samples`.

    Raises:
        ExportError: no file holds; with the table of those tried.
    """
    name = metric or MAIN_METRIC[problem]
    opened = OnnxModel(path)
    few = calibration or samples
    few = few.subset(torch.linspace(0, len(few) - 1, min(len(few), CALIBRATION_SAMPLES)).long())
    targets = to_numpy(samples.targets)
    made = repeatable(lambda: file_feeds(opened, samples, preprocess, batch_size))

    def measure(model: OnnxModel) -> float:
        counter = make_counter(problem, classes)
        for feed in made():
            logits = model(feed.inputs)
            counter.update(targets[feed.index], logits if to_value is None else to_value(logits))
        return counter.metrics()[name]

    return lower_precision(
        path, precision, calibration=[feed.inputs for feed in file_feeds(opened, few, preprocess, batch_size)],
        metric=measure, metric_name=name, max_drop=max_drop,
        higher_is_better=name not in ("loss", "rmse", "mae"),
    )  # fmt: skip


def lower(
    path: str | Path,
    precision: str,
    module: nn.Module,
    samples: Samples,
    preprocess: Any,
    *,
    problem: Problem,
    classes: Sequence[str] | None,
    report: str | Path | None = None,
    known: Known | None = None,
    to_value: Callable[[Any], Any] | None = None,
    max_drop: float = 0.01,
    metric: str | None = None,
    calibration: Samples | None = None,
    batch_size: int = BATCH_SIZE,
) -> Parity:
    """Turn a float32 file that was proven into one of lower precision, in its place, and prove that, too.

    Where no file holds, the float32 file stays, and the table of what was tried is added to the report.

    Args:
        As `prove` and `in_precision`.

    Raises:
        ExportError: no file holds, or it does not say what its logits say.
    """
    try:
        content, table = in_precision(
            path, precision, samples, preprocess, problem=problem, classes=classes, max_drop=max_drop, metric=metric,
            calibration=calibration, batch_size=batch_size, to_value=to_value,
        )  # fmt: skip
    except ExportError as error:
        tried = getattr(error, "table", None)
        if report is not None and tried is not None and Path(report).is_file():
            written = json.loads(Path(report).read_text(encoding="utf-8"))
            write_json(report, {**written, "precision": finite(tried.to_dict())})
        raise
    write_atomic(path, lambda file: file.write(content))
    return prove(
        path, module, samples, preprocess, problem=problem, classes=classes, report=report, known=known,
        to_value=to_value, precision=table, batch_size=batch_size,
    )  # fmt: skip


def file_feeds(model: OnnxModel, samples: Samples, preprocess: Any, batch_size: int) -> Iterator[Feed]:
    """All samples as the file takes them."""
    if model.meta.inputs_form != "tensor":
        yield from feeds(model, raw_inputs(samples), batch_size=batch_size)
        return
    for batch in Batches(samples, preprocess, batch_size, shuffle=False).epoch(0):
        inputs = batch.inputs if isinstance(batch.inputs, dict) else {model.inputs[0].name: batch.inputs}
        yield Feed({name: to_numpy(values) for name, values in inputs.items()}, to_numpy(batch.index))


def repeatable(make: Callable[[], Iterable[Feed]]) -> Callable[[], Iterable[Feed]]:
    """A function that gives the same batches each time: kept ones while they take less than 256 MB, else made anew."""
    kept: list[Feed] = []
    num_bytes = 0
    for feed in make():
        num_bytes += sum(array.nbytes for array in feed.inputs.values())
        if num_bytes > KEPT_BYTES:
            return make
        kept.append(feed)
    return lambda: kept


def _opened(path: str | Path, provider: str | None) -> OnnxModel | str | Path:
    """The file; its path where it cannot be opened, which the proof will tell."""
    try:
        return OnnxModel(path) if provider is None else OnnxModel(path, provider=provider)
    except ExportError:
        return path


def raw_inputs(samples: Samples) -> Any:
    """The samples in the form that `feeds` takes: columns by name where they are of a table."""
    columns = getattr(samples.inputs, "columns", None)
    if isinstance(columns, dict):
        return columns
    if samples.kind == "array" and samples.columns is not None:
        matrix = to_numpy(samples.inputs)
        return {name: matrix[:, place] for place, name in enumerate(samples.columns)}
    return samples.inputs


class KeptLogits:
    """Keeps the logits of an evaluation for the proof, where they are few enough.

    Give the evaluation `kept.batches(batches)`, and what it computes for each to `kept.put(logits)`.

    Args:
        num_samples: N; 0: nothing is kept.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self._logits: NDArray[Any] | None = None
        self._targets: NDArray[Any] | None = None
        self._batch: Batch | None = None
        self._seen = 0

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        for batch in batches:
            self._batch = batch
            yield batch

    def put(self, logits: Any) -> Any:
        """The logits of the batch that came last, which are given back."""
        if self.num_samples:
            self._keep(to_numpy(logits))
        return logits

    def known(self) -> Known | None:
        """All logits; None where some are missing."""
        if self._logits is None or self._seen != self.num_samples:
            return None
        return Known(self._logits, self._targets)

    def _keep(self, logits: NDArray[Any]) -> None:
        # Outputs for each token have another length in each batch.
        if logits.ndim > 2 or logits.nbytes / max(len(logits), 1) * self.num_samples > KEPT_BYTES:
            return
        assert self._batch is not None
        index, targets = to_numpy(self._batch.index), self._batch.targets
        if self._logits is None:
            self._logits = np.zeros((self.num_samples, *logits.shape[1:]), logits.dtype)
        self._logits[index] = logits
        if targets is not None:
            if self._targets is None:
                self._targets = np.zeros((self.num_samples, *targets.shape[1:]), to_numpy(targets).dtype)
            self._targets[index] = to_numpy(targets)
        self._seen += len(index)
