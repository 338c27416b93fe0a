"""Two exported files on the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.data.raw import Raw, listed
from pyft.errors import ConfigError
from pyft.evaluation.compare import SHOWN, Comparison, compare_predictions
from pyft.evaluation.scores import predictions_from_logits
from pyft.export.run import CPU
from pyft.onnx_runtime.evaluation import File, Model, open_file
from pyft.onnx_runtime.samples import read_set


def compare(
    a: Model,
    b: Model,
    data: Any,
    *,
    metric: str | Sequence[str] = "auto",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    task: str = "auto",
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    text_column: str | None = None,
    label_column: str | None = None,
    provider: str = CPU,
    threads: int | None = None,
    shown: int = SHOWN,
) -> Comparison:
    """Metrics of two ONNX files on the same labelled data, with the uncertainty of their differences.

    Each difference b - a has the percentile interval of the paired bootstrap over the samples; for classification,
    McNemar's test tells whether the two are right equally often. Of each sample only the predictions are kept.

    Args:
        a, b: .onnx files, or folders of runs, which hold model.onnx. They may take their inputs in different forms.
            Their classes must be the same names, in any order.
        data: as for `pyft.evaluate`.
        metric: a metric of `pyft.evaluate` or several; "auto": accuracy and macro F1; for multilabel exact match, micro
            and macro F1; for regression RMSE, MAE and R2.
        resamples: draws of the bootstrap.
        confidence: of the intervals, between 0 and 1.
        seed: of the bootstrap.
        task, classes: needed where the files do not say.
        batch_size: samples at a time.
        text_column, label_column: names of columns of a table.
        provider, threads: as for `pyft.onnx_runtime.evaluate`.
        shown: how many of the samples that are predicted differently are listed.

    Raises:
        ConfigError: the files have different tasks or classes, or an argument does not fit.
        DataError: the data cannot be used.
        ExportError: a file is missing or damaged, or the provider does not run.
    """
    files = [open_file(path, task, None, classes, provider, threads) for path in (a, b)]
    _check_alike(files)
    raws = [
        read_set(data, file.model.meta, file.kind, text_column=text_column, label_column=label_column, labelled=True)
        for file in files
    ]
    first, targets = files[0].with_labels(raws[0])
    problem = first.problem or "classification"
    second = files[1].with_labels(raws[1])[0]
    order = _order(first.classes, second.classes)
    found = [_predictions(file, raw, problem, batch_size) for file, raw in zip((first, second), raws, strict=True)]
    if order is not None:
        found[1] = order[found[1]] if problem == "classification" else found[1][:, np.argsort(order)]
    return compare_predictions(
        targets, found[0], found[1], problem, first.classes, metric=metric, resamples=resamples,
        confidence=confidence, seed=seed, shown=shown, names=(_name(first, "a"), _name(second, "b")),
    )  # fmt: skip


def _check_alike(files: Sequence[File]) -> None:
    problems = [file.problem for file in files]
    if None not in problems and problems[0] != problems[1]:
        raise ConfigError(f"a is for {problems[0]}, b for {problems[1]}; the same samples cannot judge both")
    # Before the labels are read, which would blame the data.
    _order(files[0].classes, files[1].classes)


def _order(first: list[str] | None, second: list[str] | None) -> NDArray[np.int64] | None:
    """For each class of b its place in a; None where they are the same already."""
    if first is None or second is None or first == second:
        return None
    if sorted(first) != sorted(second) or len(set(first)) < len(first):
        only_a, only_b = sorted(set(first) - set(second)), sorted(set(second) - set(first))
        raise ConfigError(
            f"a and b have different classes: a alone has {listed(only_a) or 'none'}, b alone "
            f"{listed(only_b) or 'none'}; compare files that were tuned on the same labels"
        )
    place = {name: number for number, name in enumerate(first)}
    return np.array([place[name] for name in second], dtype=np.int64)


def _predictions(file: File, raw: Raw, problem: str, batch_size: int) -> NDArray[Any]:
    """Class index (N,), 0/1 (N, C), or values (N, ...); the logits of one batch at a time are in memory."""
    found: NDArray[Any] | None = None
    for logits, index in file.answers(raw.inputs, batch_size, None):
        answer = predictions_from_logits(logits, problem)
        if found is None:
            dtype = {"classification": np.int64, "multilabel": np.bool_}.get(problem, np.float64)
            found = np.empty((len(raw), *answer.shape[1:]), dtype)
        found[index] = answer
    assert found is not None
    return found


def _name(file: File, fallback: str) -> str:
    return fallback if file.model.path is None else str(file.model.path)
