"""One ONNX graph in fewer bits: fp16, int8 with scales found while it runs (dynamic) or from calibration (static)."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyft.errors import ConfigError, need
from pyft.export.run import CPU

WEIGHT_INPUT = {"Conv": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
"""Operators whose weights are worth fewer bits, and which input the weight is."""

MIN_ELEMENTS = 256
"""Smaller weights save nothing."""

STATIC_OPS = (
    "Conv",
    "Gemm",
    "MatMul",
    "Gather",
    "Add",
    "Mul",
    "Clip",
    "Relu",
    "GlobalAveragePool",
    "AveragePool",
    "MaxPool",
)


@dataclass(frozen=True)
class Weight:
    """A node with a weight of its own.

    Attributes:
        node: its name. op_type: its operator.
        num_bytes: of the weight, in float32.
    """

    node: str
    op_type: str
    num_bytes: int


def weights_of(proto: Any) -> list[Weight]:
    """The nodes of the model with float32 weights of at least two dimensions, in the order in which they run."""
    outside = outer_nodes(proto)
    float32 = need("onnx", "onnx", "lowering the precision of an ONNX file").TensorProto.FLOAT
    sizes = {value.name: int(np.prod(value.dims)) for value in proto.graph.initializer
             if value.data_type == float32 and len(value.dims) > 1}  # fmt: skip
    found = []
    for node in proto.graph.node:
        place = WEIGHT_INPUT.get(node.op_type)
        if place is None or node.name in outside or len(node.input) <= place:
            continue
        size = sizes.get(node.input[place], 0)
        if size >= MIN_ELEMENTS:
            found.append(Weight(node.name, node.op_type, 4 * size))
    return found


def weight_bytes(proto: Any) -> int:
    """Bytes of all float32 arrays of two dimensions and more, also of operators that are not in `weights_of` (LSTM)."""
    float32 = need("onnx", "onnx", "lowering the precision of an ONNX file").TensorProto.FLOAT
    return sum(
        4 * int(np.prod(value.dims))
        for value in proto.graph.initializer
        if value.data_type == float32 and len(value.dims) > 1
    )


def outer_nodes(proto: Any) -> set[str]:
    """Names of the nodes before and behind the model: preprocessing, scores and labels. They keep their precision.

    `pyft.export.graph.Graph` gives its nodes names with its own in front, and ends in an Identity "<graph>/<output>".
    """
    fronts = {
        node.name.removesuffix(f"/{node.output[0]}")
        for node in proto.graph.node
        if node.op_type == "Identity" and node.output and node.name.endswith(f"/{node.output[0]}")
    }
    return {node.name for node in proto.graph.node if node.name.partition("/")[0] in fronts}


def named_nodes(proto: Any) -> Any:
    """A copy of the graph in which every node has a name of its own, by which it can be excluded."""
    copy = _copy(proto)
    taken: set[str] = set()
    for number, node in enumerate(copy.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        taken.add(node.name)
    return copy


def to_fp16(proto: Any, excluded: Collection[str]) -> Any:
    """Weights and arithmetic in fp16; inputs, outputs, and what stands around the model, in float32.

    Args:
        excluded: names of nodes that stay in float32.
    """
    converter = need("onnxruntime.transformers.float16", "onnx", "precision='fp16'")
    copy = _copy(proto)
    with _quiet():
        made = converter.convert_float_to_float16(
            copy, keep_io_types=True, node_block_list=sorted({*excluded, *outer_nodes(proto)})
        )
    _without_detours(made.graph)
    return made


def _without_detours(graph: Any) -> None:
    """Between two nodes that both stay in float32 the converter goes through fp16; there and back loses digits."""
    onnx = need("onnx", "onnx", "lowering the precision of an ONNX file")
    half = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT16
    }
    for node in graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT and node.input[0] in half:
            node.input[0] = half[node.input[0]]
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    rest = [node for node in graph.node if node.op_type != "Cast" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(rest)


def to_int8_dynamic(proto: Any, excluded: Collection[str]) -> Any:
    """Weights in int8 with a scale per channel; the scale of activations is found in each run.

    Weights take 7 bits: products of 8 bits overflow the 16-bit sums of CPUs without VNNI, without a word. Convolutions
    are left alone, as onnxruntime runs them slowly in this form.
    """
    library = need("onnxruntime.quantization", "onnx", "precision='int8'")
    chosen = [weight for weight in weights_of(proto) if weight.op_type != "Conv" and weight.node not in excluded]
    if not chosen:
        # An empty list of nodes means all of them to onnxruntime.
        return proto
    return _written(
        lambda path: library.quantize_dynamic(
            _copy(proto), path, op_types_to_quantize=["MatMul", "Gather"], per_channel=True, reduce_range=True,
            # A Gemm becomes a MatMul and an Add first.
            nodes_to_quantize=[name for w in chosen for name in (w.node, f"{w.node}_MatMul")],
            weight_type=library.QuantType.QInt8,
        )
    )  # fmt: skip


def to_int8_static(
    proto: Any, excluded: Collection[str], calibration: Sequence[Mapping[str, Any]], provider: str = CPU
) -> Any:
    """Weights in int8 with a scale per channel, activations in uint8 with the range in the calibration data.

    Args:
        calibration: what the file is fed with, in batches.

    Raises:
        ConfigError: no calibration data.
    """
    if not calibration:
        raise ConfigError("calibration: static quantisation needs samples of what the file is fed with, got none")
    library = need("onnxruntime.quantization", "onnx", "precision='int8'")
    kept = {*excluded, *outer_nodes(proto)}
    reader = type("Reader", (library.CalibrationDataReader,), {"get_next": _reader(calibration)})()
    return _written(
        lambda path: library.quantize_static(
            _copy(proto), path, reader, quant_format=library.QuantFormat.QDQ, per_channel=True, reduce_range=True,
            op_types_to_quantize=list(STATIC_OPS), nodes_to_exclude=sorted(kept),
            activation_type=library.QuantType.QUInt8, weight_type=library.QuantType.QInt8,
            calibrate_method=library.CalibrationMethod.MinMax, calibration_providers=[provider],
        )
    )  # fmt: skip


def _copy(proto: Any) -> Any:
    """The quantisers change what they are given."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


def _reader(calibration: Sequence[Mapping[str, Any]]) -> Any:
    rest = iter(calibration)
    return lambda _: next(rest, None)


def _written(write: Any) -> Any:
    """What a quantiser writes to a path, as a ModelProto."""
    onnx = need("onnx", "onnx", "lowering the precision of an ONNX file")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, "lower.onnx")
        write(path)
        return onnx.load(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantisers log advice to the root logger, which is for nobody who calls pyft."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
