"""The formulas of the metrics, on counts and sums whose last dimension is the class or output."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ratio(part: Any, whole: Any) -> Floats:
    """part / whole in float64, with 0 / 0 = 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def classification_values(correct: NDArray[Any], support: NDArray[Any], predicted: NDArray[Any]) -> dict[str, Floats]:
    """Metrics of single-label classification, each (...).

    Args:
        correct: (..., C) samples of each class that were predicted so.
        support: (..., C) samples of each class.
        predicted: (..., C) times that each class was predicted.

    Macro means are over the classes that occur in targets or predictions.

    >>> float(classification_values(np.array([1, 1]), np.array([1, 3]), np.array([3, 1]))["accuracy"])
    0.5
    """
    total = support.sum(axis=-1)
    precision, recall = ratio(correct, predicted), ratio(correct, support)
    f1 = ratio(2 * correct, support + predicted)
    met = (support + predicted) > 0
    return {
        "accuracy": correct.sum(axis=-1) / total,
        "macro_f1": f1.mean(axis=-1, where=met),
        "macro_precision": precision.mean(axis=-1, where=met),
        "macro_recall": recall.mean(axis=-1, where=met),
        "weighted_f1": (f1 * support).sum(axis=-1) / total,
        "balanced_accuracy": recall.mean(axis=-1, where=support > 0),
    }


def multilabel_values(
    correct: NDArray[Any], support: NDArray[Any], predicted: NDArray[Any], exact: Any, total: Any
) -> dict[str, Floats]:
    """Metrics of multilabel classification, each (...).

    Args:
        correct, support, predicted: (..., C) ones that were right, that are there, that were predicted.
        exact: (...) samples whose labels were all right.
        total: (...) samples.
    """
    precision, recall = ratio(correct, predicted), ratio(correct, support)
    f1 = ratio(2 * correct, support + predicted)
    found, there, said = correct.sum(axis=-1), support.sum(axis=-1), predicted.sum(axis=-1)
    return {
        "exact_match": np.asarray(exact / total),
        "micro_f1": ratio(2 * found, there + said),
        "micro_precision": ratio(found, said),
        "micro_recall": ratio(found, there),
        "macro_f1": f1.mean(axis=-1),
        "macro_precision": precision.mean(axis=-1),
        "macro_recall": recall.mean(axis=-1),
    }


def regression_values(
    squared: Floats, absolute: Floats, variation: Floats, constant: NDArray[np.bool_], total: Any
) -> dict[str, Floats]:
    """Metrics of regression, each (...), means over the K outputs.

    Args:
        squared, absolute: (..., K) sums of the squared and absolute errors.
        variation: (..., K) sum of the squared distances of the targets from their mean.
        constant: (..., K) whether all targets are the same; R2 is then 1 if predicted exactly, else 0.
        total: samples; R2 of one sample is NaN.
    """
    explained = 1 - squared / np.where(constant, 1.0, variation)
    r2 = np.where(constant, (squared == 0).astype(np.float64), explained).mean(axis=-1)
    return {
        "rmse": np.sqrt(squared / total).mean(axis=-1),
        "mae": (absolute / total).mean(axis=-1),
        "r2": r2 if total > 1 else np.full_like(r2, np.nan),
        "loss": (squared / total).mean(axis=-1),
    }
