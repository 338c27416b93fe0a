"""The proof of an exported file on a run's own samples: joins data, model, metrics and `pyft.export.parity`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyft.data.batches import Batches
from pyft.data.table_rows import TableRows
from pyft.errors import ExportError
from pyft.evaluation.metrics import make_counter
from pyft.evaluation.scores import to_numpy
from pyft.export.parity import Known, Parity, check_parity
from pyft.export.precision import lower_precision
from pyft.export.precision_table import PrecisionTable
from pyft.export.run import OnnxModel
from pyft.models.call import call_model
from pyft.onnx_runtime.feed import Feed, feeds
from pyft.samples import Batch, Problem, Samples

BATCH_SIZE = 64
CALIBRATION_SAMPLES = 256
KEPT_BYTES = 2**28
"""Logits of an evaluation are kept for the proof while they take less than this."""

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
    # Pictures and tokens are made once, as every candidate is measured on the same.
    made = [(feed.inputs, targets[feed.index]) for feed in file_feeds(opened, samples, preprocess, batch_size)]

    def measure(model: OnnxModel) -> float:
        counter = make_counter(problem, classes)
        for inputs, wanted in made:
            counter.update(wanted, model(inputs))
        return counter.metrics()[name]

    return lower_precision(
        path, precision, calibration=[feed.inputs for feed in file_feeds(opened, few, preprocess, batch_size)],
        metric=measure, metric_name=name, max_drop=max_drop,
        higher_is_better=name not in ("loss", "rmse", "mae"),
    )  # fmt: skip


def file_feeds(model: OnnxModel, samples: Samples, preprocess: Any, batch_size: int) -> Iterator[Feed]:
    """All samples as the file takes them."""
    if model.meta.inputs_form != "tensor":
        yield from feeds(model, raw_inputs(samples), batch_size=batch_size)
        return
    for batch in Batches(samples, preprocess, batch_size, shuffle=False).epoch(0):
        inputs = batch.inputs if isinstance(batch.inputs, dict) else {model.inputs[0].name: batch.inputs}
        yield Feed({name: to_numpy(values) for name, values in inputs.items()}, to_numpy(batch.index))


def _opened(path: str | Path, provider: str | None) -> OnnxModel | str | Path:
    """The file; its path where it cannot be opened, which the proof will tell."""
    try:
        return OnnxModel(path) if provider is None else OnnxModel(path, provider=provider)
    except ExportError:
        return path


def raw_inputs(samples: Samples) -> Any:
    """The samples in the form that `feeds` takes: columns by name where they are of a table."""
    if isinstance(samples.inputs, TableRows):
        return samples.inputs.columns
    if samples.kind == "array" and samples.columns is not None and not isinstance(samples.inputs, dict):
        matrix = to_numpy(samples.inputs)
        return {name: matrix[:, place] for place, name in enumerate(samples.columns)}
    return samples.inputs


class KeptLogits:
    """Keeps the logits of an evaluation for the proof, where they are few enough.

    Give the evaluation `kept.call(call)` and `kept.batches(batches)`.

    Args:
        num_samples: N.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self._logits: Any = None
        self._targets: Any = None
        self._index: Any = None
        self._seen = 0

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        for batch in batches:
            index = to_numpy(batch.index)
            if batch.targets is not None:
                targets = to_numpy(batch.targets)
                if self._targets is None:
                    self._targets = np.zeros((self.num_samples, *targets.shape[1:]), targets.dtype)
                self._targets[index] = targets
            self._index = index
            yield batch

    def call(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The same function."""

        def kept(inputs: Any) -> Any:
            logits = call(inputs)
            self._keep(to_numpy(logits))
            return logits

        return kept

    def known(self) -> Known | None:
        """All logits; None where some are missing."""
        if self._logits is None or self._seen != self.num_samples:
            return None
        return Known(self._logits, self._targets)

    def _keep(self, logits: Any) -> None:
        # Outputs for each token have another length in each batch.
        if logits.ndim > 2 or logits.nbytes / max(len(logits), 1) * self.num_samples > KEPT_BYTES:
            return
        if self._logits is None:
            self._logits = np.zeros((self.num_samples, *logits.shape[1:]), logits.dtype)
        self._logits[self._index] = logits
        self._seen += len(self._index)
