"""The columns of a table before the model in the file: imputation, scaling, one-hot as `TablePreprocess` does them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyft.errors import ConfigError
from pyft.export.graph import Graph, Value

ML_OPSET = 2
"""Of ai.onnx.ml: the first whose LabelEncoder maps text to whole numbers by attributes."""


def table_front(spec: Mapping[str, Any], inputs: Sequence[str]) -> Graph:
    """From one input per column, float32 (B,) or string (B,), to the features (B, F) of the model.

    The inputs have the names and the order of the columns. A missing number is NaN, a missing word "". The features
    have the bits that `TablePreprocess.matrix` gives: all arithmetic is float32, in its order.

    Args:
        spec: of a fitted `TablePreprocess`.
        inputs: names of the model's inputs.

    Raises:
        ConfigError: the spec is not fitted, or the model takes more than one input.
    """
    if "columns" not in spec:
        raise ConfigError("preprocess: this table preprocessing has seen no training rows; give a fitted one")
    if len(inputs) != 1:
        raise ConfigError(
            f"inputs='raw': a model of tables takes one input, this one takes {', '.join(inputs)}: give inputs='tensor'"
        )
    graph = Graph("table")
    words = {column["name"]: column["values"] for column in spec["one_hot"]}
    given = {name: graph.input(name, np.str_ if name in words else np.float32, ["batch"]) for name in spec["columns"]}
    parts = [_scaled(graph, spec["numbers"], given)] if spec["numbers"] else []
    parts += [_one_hot(graph, given[name], values) for name, values in words.items()]
    features = parts[0] if len(parts) == 1 else graph.Concat(*parts, axis=1)
    width = len(spec["numbers"]) + sum(map(len, words.values()))
    graph.output(inputs[0], features, ["batch", width])
    return graph


def _scaled(graph: Graph, columns: Sequence[Mapping[str, Any]], given: Mapping[str, Value]) -> Value:
    """All numbers (B, columns): gaps filled, then (x - mean) / std."""
    median, mean, std = (
        np.array([column[key] for column in columns], dtype=np.float32) for key in ("median", "mean", "std")
    )
    rows = [graph.Unsqueeze(given[column["name"]], [1]) for column in columns]
    numbers = rows[0] if len(rows) == 1 else graph.Concat(*rows, axis=1)
    return (graph.Where(graph.IsNaN(numbers), median, numbers) - mean) / std


def _one_hot(graph: Graph, cells: Value, values: Sequence[str]) -> Value:
    """(B, values) float32: 1 where the cell is the value; a row of zeros for any other."""
    graph.opsets["ai.onnx.ml"] = ML_OPSET
    places = list(range(len(values)))
    code = graph.LabelEncoder(
        cells, keys_strings=list(values), values_int64s=places, default_int64=-1, domain="ai.onnx.ml", dtype=np.int64
    )
    return graph.Equal(graph.Unsqueeze(code, [1]), graph.constant(places, np.int64)).to(np.float32)
