"""The first node of an ONNX graph whose value is not that of the PyTorch model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import need
from pyft.export.comparison import relative_difference, take_rows
from pyft.export.run import CPU

if TYPE_CHECKING:
    from torch import nn

    from pyft.export.reference import Reference

NOISE = 1e-6
"""What rounding in float32 does to a value, relative to the largest of its tensor."""

MAX_BYTES = 2**31 - 2**20
"""With other outputs a graph is given to onnxruntime as one message, which holds less than 2 GiB."""

SAME = 10 * NOISE
"""Logits that are nearer than this do not differ."""


@dataclass(frozen=True)
class FirstDifference:
    """Where the values of an ONNX graph leave those of the PyTorch model.

    Attributes:
        part: "input" (the file was fed something else than the model), "preprocessing" (the graph in front of the
            model), "model", or "training" (a node that behaves as in training).
        node, op_type: name and operator of the node; "" for an input.
        output: the value that differs.
        module: path of the module that makes this value in PyTorch, or that behind it where PyTorch has no such value;
            "" for the model itself and where not known.
        before: the largest relative difference of all values that come before and could be compared.
        after: the relative difference of `output`.
    """

    part: str
    node: str
    op_type: str
    output: str
    module: str = ""
    before: float = 0.0
    after: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        figures = f"relative difference {self.before:.1e} before it, {self.after:.1e} behind it"
        if self.part == "input":
            return f"the file's input '{self.output}' is not what the model is given ({self.after:.1e} apart)"
        node = f"node '{self.node}' ({self.op_type}, output '{self.output}'"
        if self.part == "training":
            return f"{node}) behaves as in training: export the model in eval mode"
        if self.part == "preprocessing":
            return (
                f"the preprocessing in front of the model gives another '{self.output}' than in training: {node}), "
                f"{figures}"
            )
        return f"the values differ first at {node}{f', module {self.module!r}' if self.module else ''}): {figures}"


def first_difference(
    module: nn.Module,
    path: str | os.PathLike[str],
    inputs: Any,
    feed: Any,
    row: int | None = None,
    *,
    provider: str = CPU,
) -> FirstDifference | None:
    """Find the first node of a file, in the order in which it runs, that gives another value than the model.

    The model is exported once more for the names of its inner values; the file, which may have been changed since it
    was written, is run with those as outputs.

    Args:
        module: the PyTorch model in eval mode.
        path: the file.
        inputs: Tensor (B, ...) or dict of Tensors that the model is called with.
        feed: what the file is called with: an array (B, ...) or a dict of them.
        row: the sample of the batch that differs most, looked at first alone; None: the batch.

    Returns:
        None where no value differs, where the file does not run on these inputs, or holds 2 GiB and more.

    Raises:
        Exception: whatever the exporter raises where it cannot export the module.
    """
    onnx = need("onnx", "onnx", "looking into an ONNX file")
    from pyft.export.reference import reference_of

    proto = onnx.load(os.fspath(path))
    if proto.ByteSize() > MAX_BYTES:
        return None
    if not isinstance(feed, Mapping):
        feed = {proto.graph.input[0].name: feed}
    reference = reference_of(module, inputs)
    rows = [] if row is None else [np.array([row])]
    for chosen in [*rows, None]:
        here = (inputs, feed) if chosen is None else (take_rows(inputs, chosen), take_rows(feed, chosen))
        try:
            found = _Search(reference, proto, *here, provider).first()
        except Exception as error:
            if "onnxruntime" not in type(error).__module__:
                raise
            continue
        if found is not None:
            return found
    return None


def training_node(path: str | os.PathLike[str]) -> FirstDifference | None:
    """The first node of a file that behaves as in training, or None."""
    onnx = need("onnx", "onnx", "looking into an ONNX file")
    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    constants = {value.name: value for value in graph.initializer}
    for node in _nodes(graph):
        mode = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            flag = constants.get(node.input[2])
            mode = flag is None or bool(onnx.numpy_helper.to_array(flag))
        if mode:
            return FirstDifference("training", node.name, node.op_type, node.output[0])
    return None


class _Search:
    """One batch, in PyTorch, in the graph that the exporter makes now, and in the file."""

    def __init__(self, reference: Reference, proto: Any, inputs: Any, feed: Mapping[str, Any], provider: str) -> None:
        from pyft.export.reference import graph_values
        from pyft.export.shapes import named_inputs

        self.reference = reference
        self.proto = proto
        self.feed = feed
        self.provider = provider
        self.torch = reference.torch_values(inputs)
        fresh_names = _inner_names(reference.proto) & (set(self.torch) | _inner_names(proto))
        self.fresh = graph_values(reference.proto, sorted(fresh_names), named_inputs(inputs), CPU)
        self.producers = {name: node for node in proto.graph.node for name in node.output if name}
        self.compared = self._references()

    def first(self) -> FirstDifference | None:
        """The first difference, or None."""
        from pyft.export.reference import graph_values

        for name in self.reference.inputs:
            if name in self.feed and (apart := _apart(self.torch[name], np.asarray(self.feed[name]))) > NOISE:
                return FirstDifference("input", "", "", name, after=apart)
        order = [name for node in self.proto.graph.node for name in node.output if name in self.compared]
        if "logits" not in order:
            return None
        order = order[: order.index("logits") + 1]
        found = graph_values(self.proto, order, self.feed, self.provider)
        distances = {name: _apart(self.compared[name], found[name]) for name in order}
        final = distances["logits"]
        limit, before = _limit(final), 0.0
        for name in order if final > SAME else ():
            if not distances[name] <= limit:
                return self._at(name, before, distances[name])
            before = max(before, distances[name])
        return self._with_fusions(order)

    def _with_fusions(self, order: list[str]) -> FirstDifference | None:
        """An inner value that is looked at cannot be fused away, so a fault of a fusion needs one value at a time."""
        from pyft.export.reference import graph_values

        def apart(name: str) -> float:
            return _apart(self.compared[name], graph_values(self.proto, [name], self.feed, self.provider)[name])

        final = apart(order[-1])
        limit = _limit(final)
        if final <= SAME:
            return None
        low, high, before, after = -1, len(order) - 1, 0.0, final
        while high - low > 1:
            middle = (low + high) // 2
            here = apart(order[middle])
            if here <= limit:
                low, before = middle, here
            else:
                high, after = middle, here
        return self._at(order[high], before, after)

    def _references(self) -> dict[str, NDArray[Any]]:
        """The value that each name must have.

        An optimisation of the exporter may give a name to another value than PyTorch does: such a name differs in the
        new graph, too, and is left out. Names that PyTorch does not have are those of the new graph.
        """
        logits = _apart(self.torch["logits"], self.fresh.get("logits", self.torch["logits"]))
        if logits > SAME:
            # The exporter or onnxruntime itself is at fault, so its graph tells nothing.
            return {name: value for name, value in self.torch.items() if name in self.producers}
        values = {}
        nodes = {name: node for node in self.reference.proto.graph.node for name in node.output}
        for name, fresh in self.fresh.items():
            if name not in self.producers:
                continue
            if name not in self.torch:
                if _same_node(nodes[name], self.producers[name]):
                    values[name] = fresh
            elif _apart(self.torch[name], fresh) <= _limit(1e-4):
                values[name] = self.torch[name]
        for name in self.reference.inputs:
            if name in self.producers:
                values[name] = self.torch[name]
        return values

    def _at(self, name: str, before: float, after: float) -> FirstDifference:
        node = self.producers[name]
        part = "preprocessing" if name in self.reference.inputs else "model"
        module = "" if part == "preprocessing" else self._module_of(name)
        return FirstDifference(part, node.name, node.op_type, name, module, before, after)

    def _module_of(self, name: str) -> str:
        """The module that makes a value, or the next one behind it that PyTorch has."""
        names, seen = [name], {name}
        for one in names:
            if one in self.reference.modules:
                return self.reference.modules[one]
            behind = [n for node in self.proto.graph.node if one in node.input for n in node.output if n not in seen]
            seen.update(behind)
            names += behind
        return ""


def _limit(final: float) -> float:
    """Halfway, on a scale of powers, between rounding and the difference at the end."""
    return float(np.sqrt(NOISE * min(max(final, NOISE), 1.0))) if np.isfinite(final) else float(np.sqrt(NOISE))


def _apart(wanted: NDArray[Any], found: NDArray[Any]) -> float:
    """Relative difference; inf for another shape and where only one side is finite."""
    if wanted.shape != found.shape:
        return float("inf")
    if wanted.dtype.kind not in "fiub" or found.dtype.kind not in "fiub":
        return 0.0 if np.array_equal(wanted, found) else float("inf")
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    return relative_difference(a[finite], b[finite])


def _inner_names(proto: Any) -> set[str]:
    return {name for node in proto.graph.node for name in node.output if name}


def _same_node(one: Any, other: Any) -> bool:
    return one.op_type == other.op_type and list(one.input) == list(other.input)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _nodes(inner)
