"""What stands behind the model in the file: scores, labels and values, made from its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyft.errors import ConfigError
from pyft.export.graph import Graph, Value


def outputs_of(
    problem: str,
    shape: Sequence[int | str],
    classes: Sequence[str] | None = None,
    target: Mapping[str, Any] | None = None,
) -> Graph | None:
    """The outputs that follow the logits; None where the task is not known.

    Args:
        problem: "classification": `scores` (softmax), `label_index` and, with classes, `label`. "multilabel": `scores`
            (sigmoid) and `label_index` (1 where the score is above one half). "regression": `value` (B,) or (B, K).
        shape: of the logits, "batch" first.
        classes: names in the order of the last dimension.
        target: for regression "mean" and "std", each a number or one per output: the value is logits * std + mean.

    Raises:
        ConfigError: the logits do not have the form of the problem, or `target` does not fit.
    """
    if not problem:
        return None
    graph = Graph("outputs")
    logits = Value(graph, "logits", np.float32)
    if problem == "regression":
        _values(graph, logits, list(shape), target)
        return graph
    if len(shape) < 2 or (shape[-1] == 1 and problem == "classification"):
        raise ConfigError(
            f"task={problem!r}: expected logits (B, C) with a column per class, got {tuple(shape)}; a model with one "
            "output per sample is for task='regression'"
        )
    if problem == "multilabel":
        graph.output("scores", graph.Sigmoid(logits), shape)
        graph.output("label_index", graph.Greater(logits, 0.0).to(np.int64), shape)
        return graph
    graph.output("scores", graph.Softmax(logits, axis=-1), shape)
    index = graph.ArgMax(logits, axis=-1, keepdims=0)
    graph.output("label_index", index, shape[:-1])
    if classes is not None:
        names = graph.constant(np.array([str(name) for name in classes], dtype=object))
        graph.output("label", graph.Gather(names, index, axis=0), shape[:-1])
    return graph


def in_unit(outputs: Any, target: Mapping[str, Any]) -> Any:
    """outputs * std + mean of an array (B, ...) or a Value of a graph, in float32."""
    mean, std = (np.asarray(target[key], dtype=np.float32).reshape(-1) for key in ("mean", "std"))
    return outputs * std + mean


def _values(graph: Graph, logits: Value, shape: list[int | str], target: Mapping[str, Any] | None) -> None:
    value = logits
    if target is not None:
        means, deviations = (np.asarray(target[key]).size for key in ("mean", "std"))
        if means != deviations or means not in (1, shape[-1] if len(shape) > 1 else 1):
            raise ConfigError(f"target: {means} means and {deviations} deviations for logits of shape {tuple(shape)}")
        value = in_unit(logits, target)
    if len(shape) == 2 and shape[1] == 1:
        value, shape = graph.Squeeze(value, [1]), shape[:1]
    graph.output("value", value, shape)
