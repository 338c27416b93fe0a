"""Graphs of `pyft.export.graph` run on their own, without a model."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime


def session_of(graph: Any, inputs: list[Any] | None = None) -> onnxruntime.InferenceSession:
    """The graph, checked, in onnxruntime.

    Args:
        inputs: value infos of what it takes from a model, where it stands behind one.
    """
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes, graph.name, [*graph.inputs, *(inputs or [])], graph.outputs, graph.initializers
        ),
        opset_imports=[onnx.helper.make_opsetid(*entry) for entry in {"": 18, **graph.opsets}.items()],
        ir_version=9,
    )
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString())


def floats(name: str, *shape: int | str) -> Any:
    """A float32 value info."""
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))
