"""From logits to probabilities, predictions and log loss, in NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import ConfigError

FloatArray = NDArray[np.floating[Any]]


def to_numpy(values: Any) -> NDArray[Any]:
    """A NumPy array of a torch Tensor (any device; half precisions widened to float32), array or list."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point() and values.element_size() < 4:
            values = values.float()
        return values.numpy()
    return np.asarray(values)


def softmax(logits: FloatArray) -> FloatArray:
    """Probabilities along the last dimension; no overflow for any finite logit.

    >>> softmax(np.array([[1000.0, 1000.0]]))
    array([[0.5, 0.5]])
    """
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def sigmoid(logits: FloatArray) -> FloatArray:
    """Probability of each logit on its own; no overflow for any finite logit.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def cross_entropy(logits: FloatArray, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log probability of the target class, (N, C) and (N,) to (N,), in float64."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1)
    total = np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    # The peak is taken off before the log is added: 1e6 + 1e-12 would lose the second.
    return total - (wide[np.arange(len(wide)), targets] - peak)


def binary_cross_entropy(logits: FloatArray, targets: NDArray[Any]) -> NDArray[np.float64]:
    """Negative log probability of each 0/1 target, (N, C) to (N, C), in float64."""
    wide = logits.astype(np.float64)
    return np.maximum(wide, 0) - wide * targets + np.log1p(np.exp(-np.abs(wide)))


def scores_from_logits(logits: FloatArray, problem: str) -> FloatArray:
    """What a user reads: softmax for classification, sigmoid for multilabel, the value itself for regression.

    Args:
        logits: (N, C), as the model gives them.
        problem: "classification", "multilabel" or "regression".

    Raises:
        ConfigError: another problem.
    """
    if problem == "classification":
        return softmax(logits)
    if problem == "multilabel":
        return sigmoid(logits)
    if problem == "regression":
        return logits
    raise ConfigError(f"problem must be 'classification', 'multilabel' or 'regression', got {problem!r}")


def predictions_from_logits(logits: FloatArray, problem: str) -> NDArray[Any]:
    """Class index (N,) for classification, 0/1 (N, C) for multilabel, the value itself for regression.

    Raises:
        ConfigError: another problem.
    """
    if problem == "classification":
        return logits.argmax(axis=-1)
    if problem == "multilabel":
        return (logits > 0).astype(np.int64)
    return scores_from_logits(logits, problem)
