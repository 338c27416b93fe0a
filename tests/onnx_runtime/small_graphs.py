"""Small ONNX files, built node by node, that say of themselves what pyft's files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

TYPES = {np.float32: TensorProto.FLOAT, np.int64: TensorProto.INT64, np.uint8: TensorProto.UINT8}
TYPES[np.object_] = TensorProto.STRING


def save_graph(
    path: Path,
    inputs: dict[str, tuple[Any, list[Any]]],
    nodes: list[tuple[Any, ...]],
    outputs: dict[str, tuple[Any, list[Any]]],
    constants: dict[str, np.ndarray] | None = None,
    **entries: Any,
) -> Path:
    """Write a graph.

    Args:
        inputs, outputs: name to (NumPy type, shape).
        nodes: (operator, input names, output names), and attributes where there are any.
        entries: metadata, without "pyft.".
    """
    graph = helper.make_graph(
        [helper.make_node(op, given, made, **(rest[0] if rest else {})) for op, given, made, *rest in nodes],
        "small",
        [helper.make_tensor_value_info(name, TYPES[kind], shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TYPES[kind], shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.contrib", 1)]
    used = {rest[0].get("domain", "") if rest else "" for _, _, _, *rest in nodes}
    model = helper.make_model(graph, opset_imports=[o for o in opsets if o.domain in used | {""}], ir_version=10)
    for key, value in entries.items():
        model.metadata_props.add(key=f"pyft.{key}", value=value if isinstance(value, str) else json.dumps(value))
    path.write_bytes(model.SerializeToString())
    return path
