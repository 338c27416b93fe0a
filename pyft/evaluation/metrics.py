"""Metrics from running counts, so that logits are never all kept. Definitions as in scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyft.errors import ConfigError, DataError
from pyft.evaluation.scores import binary_cross_entropy, cross_entropy, predictions_from_logits, to_numpy
from pyft.evaluation.table import class_lines, confused_lines, values_lines
from pyft.evaluation.values import classification_values, multilabel_values, ratio, regression_values

MAX_CONFUSION_CLASSES = 4096
"""Above this many classes the (C, C) matrix (134 MB at 4,096) is not kept; every other metric is."""


def classification_metrics(targets: Any, scores: Any, classes: Sequence[str] | int | None = None) -> Metrics:
    """Accuracy, precision, recall, F1, confusion matrix, and log loss where logits are given.

    Args:
        targets: (N,) class index.
        scores: (N, C) logits (for probabilities give their logarithm), or (N,) predicted class index.
        classes: C names in the order of the class index, or their number; None counts them from what is given.

    Returns:
        Metrics with values accuracy, macro_f1, macro_precision, macro_recall, weighted_f1, balanced_accuracy
        and, for logits, loss (mean natural-log cross-entropy). Macro means are over classes that occur in
        targets or predictions, as scikit-learn has it; 0/0 counts as 0.

    Raises:
        DataError: nothing given, shapes that do not fit, a class index outside 0..C-1, NaN in the logits.

    >>> metrics = classification_metrics([0, 1, 1], [0, 1, 0], ["no", "yes"])
    >>> round(metrics["accuracy"], 4), metrics.confusion.tolist()
    (0.6667, [[1, 0], [1, 1]])
    """
    targets, scores = to_numpy(targets), to_numpy(scores)
    if classes is None:
        classes = scores.shape[1] if scores.ndim == 2 else int(max(targets.max(initial=0), scores.max(initial=0))) + 1
    counter = ConfusionCounter(classes)
    counter.update(targets, scores)
    return counter.metrics()


def multilabel_metrics(targets: Any, scores: Any, classes: Sequence[str] | int | None = None) -> Metrics:
    """Micro and macro precision, recall and F1, exact match, and log loss where logits are given.

    Args:
        targets: (N, C) of 0 and 1.
        scores: (N, C) logits, predicted where above 0 (floating point), or predictions of 0 and 1 (int or bool).
        classes: C names, or their number.

    Returns:
        Metrics with values exact_match, micro_f1, micro_precision, micro_recall, macro_f1, macro_precision,
        macro_recall and, for logits, loss (mean over samples and classes). `confusion` is (C, 2, 2):
        [[true negative, false positive], [false negative, true positive]] of each class.

    Raises:
        DataError: nothing given, shapes that do not fit, targets other than 0 and 1, NaN in the logits.

    >>> metrics = multilabel_metrics([[1, 0], [1, 1]], [[1, 0], [0, 1]])
    >>> metrics["exact_match"], metrics["micro_f1"]
    (0.5, 0.8)
    """
    targets, scores = to_numpy(targets), to_numpy(scores)
    if classes is None:
        classes = scores.shape[1] if scores.ndim == 2 else 1
    counter = MultilabelCounter(classes)
    counter.update(targets, scores)
    return counter.metrics()


def regression_metrics(targets: Any, predictions: Any) -> Metrics:
    """Root mean squared error, mean absolute error, R2 and the mean squared error as loss.

    Args:
        targets: (N,) or (N, K), in the unit of the target.
        predictions: of the same size.

    Returns:
        Metrics with values rmse, mae (unit of the target), r2 (1 is perfect; mean over the K outputs; for a
        constant target 1 if predicted exactly, else 0; NaN for one sample) and loss (unit squared).

    Raises:
        DataError: nothing given, sizes that differ, or values that are not finite.

    >>> regression_metrics([1.0, 2.0, 3.0], [1.0, 2.0, 5.0])["mae"]
    0.6666666666666666
    """
    counter = RegressionCounter()
    counter.update(targets, predictions)
    return counter.metrics()


class Counter(Protocol):
    """What every running count offers."""

    def update(self, targets: Any, scores: Any) -> None:
        """Count one batch."""

    def metrics(self) -> Metrics:
        """The metrics of all that was counted. Raises DataError when nothing was."""


def make_counter(problem: str, classes: Sequence[str] | int | None = None) -> Counter:
    """The running count for a problem.

    Raises:
        ConfigError: an unknown problem, or no classes where the problem has them.
    """
    if problem == "regression":
        return RegressionCounter()
    if problem not in ("classification", "multilabel"):
        raise ConfigError(f"problem must be 'classification', 'multilabel' or 'regression', got {problem!r}")
    if classes is None:
        raise ConfigError(f"classes must be given for {problem}: the class names in the order of the class index")
    return ConfusionCounter(classes) if problem == "classification" else MultilabelCounter(classes)


@dataclass(frozen=True, eq=False)
class Metrics:
    """The metrics of one model on one data set; printed as a short table.

    Attributes:
        problem: "classification", "multilabel" or "regression".
        values: name to value.
        per_class: dicts of name, precision, recall, f1, support (number of samples); empty for regression.
        confusion: (C, C) int64, rows = true class, columns = predicted; (C, 2, 2) for multilabel; None for
            regression and above 4,096 classes.
        num_samples: how many samples were counted.
    """

    problem: str
    values: dict[str, float]
    num_samples: int
    per_class: list[dict[str, Any]] = field(default_factory=list)
    confusion: NDArray[np.int64] | None = None

    def __getitem__(self, name: str) -> float:
        """One value by name.

        Raises:
            ConfigError: no such value; the message lists those there are.
        """
        if name not in self.values:
            raise ConfigError(f"no metric is named {name!r}; there are: {', '.join(self.values)}")
        return self.values[name]

    def most_confused(self, number: int = 5) -> list[tuple[str, str, int]]:
        """The pairs (true, predicted, times) mistaken most often, most first; classification only."""
        if self.problem != "classification" or self.confusion is None:
            return []
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:number]
        pairs = [divmod(int(i), len(wrong)) for i in order if wrong.flat[i]]
        return [(self.per_class[t]["name"], self.per_class[p]["name"], int(wrong[t, p])) for t, p in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text for JSON; a value that is not finite becomes None."""
        return {
            "problem": self.problem,
            "num_samples": self.num_samples,
            "values": {name: value if math.isfinite(value) else None for name, value in self.values.items()},
            "per_class": [dict(row) for row in self.per_class],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }

    def __str__(self) -> str:
        size = f"{self.num_samples:,} sample{'s' * (self.num_samples != 1)}"
        lines = [f"{self.problem}: {size}" + (f", {len(self.per_class):,} classes" if self.per_class else "")]
        lines += ["", *values_lines(self.values)]
        if self.per_class:
            lines += ["", *class_lines(self.per_class)]
        if len(self.per_class) > 2 and (confused := confused_lines(self.most_confused())):
            lines += ["", *confused]
        return "\n".join(lines)


class ConfusionCounter:
    """Running counts for single-label classification.

    Memory is that of the confusion matrix, whatever the number of samples.

    Raises:
        ConfigError: no classes.

    >>> counter = ConfusionCounter(["no", "yes"])
    >>> counter.update(np.array([0, 1]), np.array([[2.0, -2.0], [3.0, 1.0]]))
    >>> counter.metrics()["accuracy"]
    0.5
    """

    def __init__(self, classes: Sequence[str] | int) -> None:
        self.names = class_names(classes)
        size = len(self.names)
        self.confusion = np.zeros((size, size), np.int64) if size <= MAX_CONFUSION_CLASSES else None
        self.correct = np.zeros(size, np.int64)
        self.support = np.zeros(size, np.int64)
        self.predicted = np.zeros(size, np.int64)
        self._loss = 0.0
        self._scored = 0

    def update(self, targets: Any, scores: Any) -> None:
        """Count one batch: targets (B,) class index, scores (B, C) logits or (B,) predicted class index.

        Raises:
            DataError: shapes that do not fit, a class index outside 0..C-1, NaN or inf in the logits.
        """
        targets, scores = to_numpy(targets), to_numpy(scores)
        size = len(self.names)
        if targets.ndim != 1 or scores.shape not in ((len(targets),), (len(targets), size)):
            raise DataError(
                f"targets must be (N,) and scores (N, {size}) or (N,), got {targets.shape} and {scores.shape}"
            )
        targets = self._index("targets", targets)
        if scores.ndim == 2:
            check_logits(scores)
            self._loss += float(cross_entropy(scores, targets).sum())
            self._scored += len(targets)
            scores = predictions_from_logits(scores, "classification")
        predicted = self._index("scores", scores)
        self.support += np.bincount(targets, minlength=size)
        self.predicted += np.bincount(predicted, minlength=size)
        self.correct += np.bincount(targets[targets == predicted], minlength=size)
        if self.confusion is not None:
            pairs = np.bincount(targets * size + predicted, minlength=size * size)
            self.confusion += pairs.reshape(size, size)

    def metrics(self) -> Metrics:
        """The metrics of all that was counted.

        Raises:
            DataError: nothing was counted.
        """
        total = counted(int(self.support.sum()))
        precision = ratio(self.correct, self.predicted)
        recall = ratio(self.correct, self.support)
        f1 = ratio(2 * self.correct, self.support + self.predicted)
        found = classification_values(self.correct, self.support, self.predicted)
        values = {name: float(value) for name, value in found.items()}
        if self._scored == total:
            values["loss"] = self._loss / total
        rows = per_class_rows(self.names, precision, recall, f1, self.support)
        confusion = None if self.confusion is None else self.confusion.copy()
        return Metrics("classification", values, total, rows, confusion)

    def _index(self, argument: str, values: NDArray[Any]) -> NDArray[np.int64]:
        if values.size and values.dtype.kind not in "iu":
            raise DataError(f"{argument}: a class index must be an integer, got {values.dtype}")
        wrong = np.flatnonzero((values < 0) | (values >= len(self.names)))
        if wrong.size:
            raise DataError(
                f"{argument}: {wrong.size} class index outside 0..{len(self.names) - 1}, "
                f"the first is {values[wrong[0]]} in row {wrong[0]}"
            )
        return values.astype(np.int64)


class MultilabelCounter:
    """Running counts for multilabel classification; see `multilabel_metrics`.

    Raises:
        ConfigError: no classes.
    """

    def __init__(self, classes: Sequence[str] | int) -> None:
        self.names = class_names(classes)
        size = len(self.names)
        self.correct = np.zeros(size, np.int64)
        self.support = np.zeros(size, np.int64)
        self.predicted = np.zeros(size, np.int64)
        self.total = 0
        self._exact = 0
        self._loss = 0.0
        self._scored = 0

    def update(self, targets: Any, scores: Any) -> None:
        """Count one batch: targets (B, C) of 0 and 1, scores (B, C) logits or predictions.

        Raises:
            DataError: shapes that do not fit, targets other than 0 and 1, NaN or inf in the logits.
        """
        targets, scores = to_numpy(targets), to_numpy(scores)
        shape = (len(targets), len(self.names))
        if targets.shape != shape or scores.shape != shape:
            came = f"{targets.shape} and {scores.shape}"
            raise DataError(f"targets and scores must be (N, {shape[1]}), one column per class, got {came}")
        true = binary("targets", targets)
        if scores.dtype.kind == "f":
            check_logits(scores)
            self._loss += float(binary_cross_entropy(scores, true).sum())
            self._scored += len(true)
            scores = predictions_from_logits(scores, "multilabel")
        predicted = binary("scores", scores)
        self.correct += (true & predicted).sum(axis=0)
        self.support += true.sum(axis=0)
        self.predicted += predicted.sum(axis=0)
        self.total += len(true)
        self._exact += int((true == predicted).all(axis=1).sum())

    def metrics(self) -> Metrics:
        """The metrics of all that was counted.

        Raises:
            DataError: nothing was counted.
        """
        total = counted(self.total)
        correct, support, predicted = self.correct, self.support, self.predicted
        precision, recall = ratio(correct, predicted), ratio(correct, support)
        f1 = ratio(2 * correct, support + predicted)
        found = multilabel_values(correct, support, predicted, self._exact, total)
        values = {name: float(value) for name, value in found.items()}
        if self._scored == total:
            values["loss"] = self._loss / (total * len(self.names))
        false_positive, false_negative = predicted - correct, support - correct
        cells = [total - correct - false_positive - false_negative, false_positive, false_negative, correct]
        rows = per_class_rows(self.names, precision, recall, f1, support)
        return Metrics("multilabel", values, total, rows, np.stack(cells, axis=1).reshape(-1, 2, 2))


class RegressionCounter:
    """Running sums for regression; see `regression_metrics`.

    Mean and variance of the targets are merged batch by batch after Chan, Golub and LeVeque,
    "Algorithms for computing the sample variance" (1983), so no digits are lost to a large mean.
    """

    def __init__(self) -> None:
        self.total = 0
        self._squared: Any = 0.0
        self._absolute: Any = 0.0
        self._mean: Any = 0.0
        self._variation: Any = 0.0
        self._low: Any = np.inf
        self._high: Any = -np.inf

    def update(self, targets: Any, scores: Any) -> None:
        """Count one batch: targets and predictions (B,) or (B, K).

        Raises:
            DataError: sizes that differ, or values that are not finite.
        """
        targets, scores = to_numpy(targets), to_numpy(scores)
        if not targets.size and not scores.size:
            return
        if targets.ndim not in (1, 2) or len(targets) != len(scores) or targets.size != scores.size:
            raise DataError(f"targets and predictions must have one size, got {targets.shape} and {scores.shape}")
        true, predicted = (a.reshape(len(a), -1).astype(np.float64) for a in (targets, scores))
        for argument, values in (("targets", true), ("predictions", predicted)):
            if (wrong := np.flatnonzero(~np.isfinite(values).all(axis=1))).size:
                raise DataError(f"{argument}: {wrong.size} not finite, the first in row {wrong[0]} of a batch")
        error = predicted - true
        self._squared = self._squared + (error**2).sum(axis=0)
        self._absolute = self._absolute + np.abs(error).sum(axis=0)
        self._merge(len(true), true.mean(axis=0), ((true - true.mean(axis=0)) ** 2).sum(axis=0))
        self._low, self._high = np.minimum(self._low, true.min(axis=0)), np.maximum(self._high, true.max(axis=0))

    def metrics(self) -> Metrics:
        """The metrics of all that was counted.

        Raises:
            DataError: nothing was counted.
        """
        total = counted(self.total)
        constant = self._low == self._high
        found = regression_values(self._squared, self._absolute, self._variation, constant, total)
        values = {name: float(value) for name, value in found.items()}
        return Metrics("regression", values, total)

    def _merge(self, number: int, mean: NDArray[np.float64], variation: NDArray[np.float64]) -> None:
        total = self.total + number
        step = mean - self._mean
        self._variation = self._variation + variation + step**2 * (self.total * number / total)
        self._mean = self._mean + step * (number / total)
        self.total = total


def class_names(classes: Sequence[str] | int) -> list[str]:
    """The class names as a list; a number C gives "0".."C-1".

    Raises:
        ConfigError: no classes.
    """
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else [str(name) for name in classes]
    if not names:
        raise ConfigError("classes must hold at least one class, got none")
    return names


def counted(total: int) -> int:
    """`total`, or DataError where it is 0."""
    if total == 0:
        raise DataError("no sample was given, so there are no metrics: check that the data set is not empty")
    return total


def check_logits(scores: NDArray[Any]) -> None:
    """Refuse NaN and +inf; -inf may mask a class, unless a row has nothing else."""
    bad = np.isnan(scores).any(axis=1) | np.isposinf(scores).any(axis=1) | np.isneginf(scores).all(axis=1)
    if bad.any():
        raise DataError(
            f"scores: {int(bad.sum())} of {len(bad)} rows are not finite, the first is row {int(bad.argmax())} of a "
            "batch: the model has diverged, or its inputs hold NaN"
        )


def binary(argument: str, values: NDArray[Any]) -> NDArray[np.bool_]:
    """Values of 0 and 1 as bool, or DataError."""
    if not ((values == 0) | (values == 1)).all():
        raise DataError(f"{argument}: multilabel values must be 0 or 1, got {values[(values != 0) & (values != 1)][0]}")
    return values.astype(bool)


def per_class_rows(
    names: list[str], precision: NDArray[Any], recall: NDArray[Any], f1: NDArray[Any], support: NDArray[Any]
) -> list[dict[str, Any]]:
    """The per-class metrics as plain dicts."""
    return [
        {"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for name, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
    ]
