"""Write an ONNX graph in Python expressions, and put graphs before and behind the graph of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pyft.errors import ConfigError, need

# Where the result is not of the type of the first operand.
RESULT_TYPES: dict[str, type[np.generic]] = {
    **dict.fromkeys(("Shape", "Size", "ArgMax", "ArgMin", "NonMaxSuppression", "NonZero"), np.int64),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "Not"), np.bool_),
}


OPSET, IR_VERSION = 18, 9
"""The lowest operator set of torch's exporter, and the file version that goes with it."""


class Value:
    """A value of a graph: its name and element type. Arithmetic on it adds nodes to the graph.

    A Python number beside it becomes a constant of the same type.
    """

    def __init__(self, graph: Graph, name: str, dtype: Any) -> None:
        self.graph = graph
        self.name = name
        self.dtype = np.dtype(dtype)

    def to(self, dtype: Any) -> Value:
        """Cast; floating point to whole numbers is cut towards zero."""
        return self.graph.Cast(self, to=_onnx_type(dtype), dtype=dtype)

    def __add__(self, other: Any) -> Value:
        return self.graph.Add(self, other)

    def __radd__(self, other: Any) -> Value:
        return self.graph.Add(other, self)

    def __sub__(self, other: Any) -> Value:
        return self.graph.Sub(self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.graph.Sub(other, self)

    def __mul__(self, other: Any) -> Value:
        return self.graph.Mul(self, other)

    def __rmul__(self, other: Any) -> Value:
        return self.graph.Mul(other, self)

    def __truediv__(self, other: Any) -> Value:
        return self.graph.Div(self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self.graph.Div(other, self)

    def __lt__(self, other: Any) -> Value:
        return self.graph.Less(self, other)

    def __ge__(self, other: Any) -> Value:
        return self.graph.GreaterOrEqual(self, other)

    def __and__(self, other: Any) -> Value:
        return self.graph.And(self, other)


class Graph:
    """A graph under construction; `graph.MatMul(a, b, ...)` adds a node of that operator and gives its Value.

    Operands are Values, NumPy arrays, Python numbers (of the type of the other operands), lists of whole numbers
    (int64) or None (an optional input left out). Keywords are the operator's attributes, besides `dtype`, the element
    type of the result where it is not that of the first operand, and `domain`.

    Args:
        name: stands in front of the names of all inner values, so that they never meet those of a model.

    Attributes:
        opsets: operator domain to version, for domains beside ONNX's own.
        marks: values that a graph further on needs, by a name that both know.

    >>> graph = Graph("double")
    >>> x = graph.input("x", np.float32, ["batch"])
    >>> graph.output("y", x * 2 + 1, ["batch"])
    >>> [node.op_type for node in graph.nodes]
    ['Mul', 'Add', 'Identity']
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.opsets: dict[str, int] = {}
        self.marks: dict[str, Value] = {}
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._count = 0

    def input(self, name: str, dtype: Any, shape: Sequence[int | str | None]) -> Value:
        """An input of the graph; a text in `shape` names a free dimension, None leaves one without a name."""
        self.inputs.append(_value_info(name, dtype, shape))
        return Value(self, name, dtype)

    def output(self, name: str, value: Value, shape: Sequence[int | str | None]) -> None:
        """Give a value out under `name`."""
        self.nodes.append(_helper().make_node("Identity", [value.name], [name], name=f"{self.name}/{name}"))
        self.outputs.append(_value_info(name, value.dtype, shape))

    def constant(self, value: Any, dtype: Any = None) -> Value:
        """An array, number or text held by the file."""
        array = np.asarray(value, dtype)
        if array.dtype.kind == "U":
            array = array.astype(object)
        name = self._fresh("constant")
        self.initializers.append(need("onnx.numpy_helper", "onnx", "exporting to ONNX").from_array(array, name))
        return Value(self, name, array.dtype)

    def node(
        self,
        op_type: str,
        *operands: Any,
        dtype: Any = None,
        domain: str = "",
        outputs: Sequence[Any] | None = None,
        **attributes: Any,
    ) -> Any:
        """Add a node. `outputs` are the element types of its results, which then come as a tuple."""
        near = next((o.dtype for o in operands if isinstance(o, Value) and o.dtype != np.bool_), np.dtype(np.bool_))
        values = [None if operand is None else self._operand(operand, near) for operand in operands]
        dtypes = outputs or [dtype or RESULT_TYPES.get(op_type) or near]
        names = [self._fresh(op_type) for _ in dtypes]
        given = [value.name if value else "" for value in values]
        node = _helper().make_node(op_type, given, names, name=names[0], domain=domain, **attributes)
        self.nodes.append(node)
        results = tuple(Value(self, name, kind) for name, kind in zip(names, dtypes, strict=True))
        return results if outputs else results[0]

    def choose(self, condition: Value, then: Graph, otherwise: Graph) -> Value:
        """`If`: the one output of one of two graphs, which may name values of this one."""
        proto = [
            _helper().make_graph(branch.nodes, branch.name, [], branch.outputs, branch.initializers)
            for branch in (then, otherwise)
        ]
        dtype = _numpy_type(then.outputs[0].type.tensor_type.elem_type)
        return self.node("If", condition, then_branch=proto[0], else_branch=proto[1], dtype=dtype)

    def loop(self, count: Value, body: Graph, start: Value) -> tuple[Value, Value]:
        """`Loop` with one carried value and one that is stacked: what they are after `count` rounds.

        Args:
            body: takes the number of the round, whether to go on, and the carried value; gives whether to go on, the
                carried value and the one to stack.
        """
        proto = _helper().make_graph(body.nodes, body.name, body.inputs, body.outputs, body.initializers)
        dtypes = [_numpy_type(value.type.tensor_type.elem_type) for value in body.outputs[1:]]
        made = self.node("Loop", count, self.constant(True), start, body=proto, outputs=dtypes)
        return made[0], made[1]

    def model(self) -> Any:
        """The graph alone as a ModelProto."""
        made = _helper().make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        opsets = [_helper().make_opsetid(*entry) for entry in {"": OPSET, **self.opsets}.items()]
        return _helper().make_model(made, opset_imports=opsets, ir_version=IR_VERSION)

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *operands, **keywords: self.node(op_type, *operands, **keywords)

    def _operand(self, operand: Any, near: np.dtype[Any]) -> Value:
        if isinstance(operand, Value):
            return operand
        if isinstance(operand, list):
            return self.constant(operand, np.int64)
        return self.constant(operand, None if isinstance(operand, np.ndarray | np.generic | str) else near)

    def _fresh(self, what: str) -> str:
        self._count += 1
        return f"{self.name}/{what}_{self._count}"


def put_before(model: Any, front: Graph) -> None:
    """Feed inputs of a ModelProto from the outputs of the same name of `front`.

    Inputs of the model that `front` does not make stay; one that `front` takes too is shared.

    Raises:
        ConfigError: an input of `front` has the name of an output of the model.
    """
    taken = {value.name for value in front.inputs}
    clash = taken & {value.name for value in model.graph.output}
    if clash:
        raise _same_name(clash)
    fed = {value.name for value in front.outputs}
    given = {value.name for value in model.graph.input} - fed
    # An input may have the name of an inner value of the model, as a column of a table that is called "relu".
    aside = {name: f"model/{name}" for name in taken & (_names(model) - given)}
    rename(model.graph, aside)
    before = list(front.nodes)
    if aside:
        before = [_helper().make_node("", [], []) for _ in front.nodes]
        for copy, node in zip(before, front.nodes, strict=True):
            copy.CopyFrom(node)
            copy.output[:] = [aside.get(name, name) for name in copy.output]
    kept = [value for value in model.graph.input if value.name in given - taken]
    nodes = [*before, *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend([*front.inputs, *kept])
    _add_rest(model, front)


def put_behind(model: Any, tail: Graph) -> None:
    """Add outputs that `tail` makes from the outputs of a ModelProto.

    Raises:
        ConfigError: an output has the name of an input of the model.
    """
    made = {value.name for value in tail.outputs}
    clash = {value.name for value in model.graph.input} & made
    if clash:
        raise _same_name(clash)
    rename(model.graph, {name: f"model/{name}" for name in _names(model) & made})
    model.graph.node.extend(tail.nodes)
    model.graph.output.extend(tail.outputs)
    _add_rest(model, tail)


def rename(graph: Any, names: dict[str, str]) -> None:
    """Rename values of a GraphProto, and where graphs inside its nodes name them."""
    for part in graphs(graph) if names else ():
        for value in [*part.input, *part.output, *part.initializer, *part.value_info]:
            value.name = names.get(value.name, value.name)
        for node in part.node:
            for listed in (node.input, node.output):
                listed[:] = [names.get(name, name) for name in listed]


def graphs(graph: Any) -> Iterator[Any]:
    """A GraphProto and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from graphs(inner)


def _names(model: Any) -> set[str]:
    parts = list(graphs(model.graph))
    named = {value.name for part in parts for value in [*part.initializer, *part.input]}
    return named | {name for part in parts for node in part.node for name in node.output}


def _same_name(clash: set[str]) -> ConfigError:
    return ConfigError(
        f"an input of the file would have the name of its output {sorted(clash)[0]!r}: rename the input (the column of "
        "a table), or give inputs='tensor'"
    )


def _add_rest(model: Any, graph: Graph) -> None:
    model.graph.initializer.extend(graph.initializers)
    known = {entry.domain for entry in model.opset_import}
    model.opset_import.extend(
        _helper().make_opsetid(domain, version) for domain, version in graph.opsets.items() if domain not in known
    )


def _helper() -> Any:
    return need("onnx.helper", "onnx", "exporting to ONNX")


def _onnx_type(dtype: Any) -> int:
    kind = np.dtype(dtype)
    if kind.kind in "OU":
        return int(need("onnx", "onnx", "exporting to ONNX").TensorProto.STRING)
    return int(_helper().np_dtype_to_tensor_dtype(kind))


def _numpy_type(number: int) -> Any:
    return _helper().tensor_dtype_to_np_dtype(number)


def _value_info(name: str, dtype: Any, shape: Sequence[int | str | None]) -> Any:
    return _helper().make_tensor_value_info(name, _onnx_type(dtype), list(shape))
