"""The values inside a PyTorch model under the names that they have in its ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export.graph_signature import InputKind

from pyft.errors import need
from pyft.export.plain_weights import plain_weights
from pyft.export.shapes import Inputs, find_free_dims, named_inputs
from pyft.export.trace import Caller, clean, traced_program

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Reference:
    """A model exported once more, so that its inner values can be looked at.

    Attributes:
        program: the ExportedProgram behind the graph.
        proto: the graph that the exporter makes of the model now.
        inputs: names of the model's inputs.
        modules: value name to the path of the module that makes it ("" for the model itself).
    """

    program: Any
    proto: Any
    inputs: tuple[str, ...]
    modules: dict[str, str]

    def torch_values(self, inputs: Any) -> Values:
        """Every tensor that PyTorch makes for a batch, by name: the model's inputs, inner values, and "logits"."""
        given = named_inputs(inputs)
        recorder = _Recorder(self.program.graph_module)
        with torch.no_grad():
            recorder.run(*_arguments(self.program, [given[name] for name in self.inputs]))
        values = recorder.values
        [output] = [
            spec.arg.name for spec in self.program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"
        ]
        values["logits"] = values.get(output, np.zeros(0))
        return {**values, **{name: _array(given[name]) for name in self.inputs}}


def reference_of(module: torch.nn.Module, inputs: Any) -> Reference:
    """Export the module with a batch as the example.

    Raises:
        Exception: whatever the exporter raises.
    """
    named = {name: value.detach().cpu() for name, value in named_inputs(inputs).items()}
    caller = Caller(plain_weights(module), list(named) if isinstance(inputs, Mapping) else None).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        program = _program(caller, named)
    proto = program.model_proto
    clean(proto)
    stacks = {
        node.name: [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        for node in program.exported_program.graph.nodes
    }
    modules = {name: stack[-1].removeprefix("model").removeprefix(".") for name, stack in stacks.items() if stack}
    [output] = program.exported_program.graph_signature.user_outputs
    if output in modules:
        modules["logits"] = modules[output]
    return Reference(program.exported_program, proto, tuple(named), modules)


def graph_values(proto: Any, names: Iterable[str], feed: Mapping[str, Any], provider: str) -> Values:
    """Run a graph and give the values of these names, which may be inner ones.

    Raises:
        Exception: whatever onnxruntime raises.
    """
    onnx = need("onnx", "onnx", "looking into an ONNX file")
    runtime = need("onnxruntime", "onnx", "looking into an ONNX file")
    wanted = list(names)
    there = {value.name for value in proto.graph.output}
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in there)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(probe.SerializeToString(), sess_options=options, providers=[provider])
    taken = {value.name for value in session.get_inputs()}
    found = session.run(wanted, {name: _array(value) for name, value in feed.items() if name in taken})
    return dict(zip(wanted, found, strict=True))


def _program(caller: Caller, inputs: Inputs) -> Any:
    free = find_free_dims(caller, inputs)
    try:
        return traced_program(caller, inputs, free, None)
    except Exception:
        # As in `trace`: lengths that cannot be kept free are fixed.
        free.names = {name: {0: "batch"} for name in inputs}
        return traced_program(caller, inputs, free, None)


class _Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps every tensor in it."""

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: Values = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """One node, its result kept."""
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, torch.Tensor):
            self.values[n.name] = _array(result)
        return result


def _arguments(program: Any, given: list[torch.Tensor]) -> list[Any]:
    """Weights, buffers and inputs in the order in which the graph takes them."""
    rest = iter(given)
    arguments = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            arguments.append(next(rest))
        else:
            arguments.append(program.state_dict.get(spec.target, program.constants.get(spec.target)))
    return arguments


def _array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
