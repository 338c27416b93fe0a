"""From a PyTorch model to an ONNX graph through torch.onnx.export: quiet, and with the first real cause on failure."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from pyft.errors import ConfigError, ExportError
from pyft.export.graph import graphs
from pyft.export.run import first_line
from pyft.export.shapes import FreeDims, Inputs, trace_inputs

CHATTY_LOGGERS = ("torch", "onnxscript", "onnx_ir", "onnx")

RANDOM_NODES = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}

MENDS = (
    (
        r"inferred a static shape of \d+ for dimension|static shape|specializ|Constraints violated",
        "in forward take sizes from the input, as in x.shape[0], never from a number",
    ),
    (
        r"data-dependent|Dynamic control flow|GuardOnDataDependent",
        "forward must not branch, loop or size a tensor on the values of a tensor: use torch.where",
    ),
    (
        r"No ONNX function found|No decompositions registered|DispatchError|Unsupported",
        "replace that operation in forward, or ask for a higher opset=",
    ),
)
PACKED_MEND = "packed sequences cannot be exported: run the RNN on the padded batch and index each sample's last step"
DEFAULT_MEND = "the model must run under torch.export.export(model, (example,))"


class Caller(torch.nn.Module):
    """The model with positional Tensors in and one Tensor out.

    Args:
        model: called as `model(x)` for a lone Tensor and as `model(**inputs)` for a dict.
        names: the input names of a dict, or None.

    Attributes:
        outputs: names in the graph of what it gives.
    """

    outputs: tuple[str, ...] = ("logits",)

    def __init__(self, model: torch.nn.Module, names: Sequence[str] | None) -> None:
        super().__init__()
        self.model = model
        self.names = None if names is None else tuple(names)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Tensors (B, ...) to logits (B, ...)."""
        return logits_of(self.call(*tensors))

    def logits(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Tensors (B, ...) to logits (B, ...), whatever else the graph gives."""
        return self(*tensors)

    def call(self, *tensors: torch.Tensor) -> Any:
        """Whatever the model gives."""
        if self.names is None:
            return self.model(*tensors)
        return self.model(**dict(zip(self.names, tensors, strict=True)))


def logits_of(output: Any) -> torch.Tensor:
    """The logits in a model's output: a Tensor, `.logits`, ["logits"], or the first of a tuple.

    Raises:
        ConfigError: no Tensor there.
    """
    found = output
    if hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, dict):
        found = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"the model must give a Tensor of logits, `.logits` or a tuple, got {type(output).__name__}")
    return found


def trace(caller: Caller, inputs: Inputs, free: FreeDims, opset: int | None) -> tuple[Any, FreeDims]:
    """The graph as an onnx ModelProto, and the dimensions that are free in it.

    Where lengths cannot be kept free, only the batch is, and a note says why.

    Raises:
        ExportError: the model cannot be traced with a free batch size.
    """
    try:
        return traced_program(caller, inputs, free, opset).model_proto, free
    except Exception as error:
        if not free.lengths():
            raise _explained(error) from error
        reason = cause(error)
    fixed = FreeDims({name: {0: "batch"} for name in inputs}, list(free.notes))
    for group in free.lengths():
        name, dim = next(iter(group.items()))
        size = inputs[name].shape[dim]
        fixed.notes.append(f"dimension {dim} of '{name}' is fixed at {size}: it cannot be exported free: {reason}")
    try:
        return traced_program(caller, inputs, fixed, opset).model_proto, fixed
    except Exception as error:
        raise _explained(error) from error


def traced_program(caller: Caller, inputs: Inputs, free: FreeDims, opset: int | None) -> Any:
    """The ONNXProgram of a model: its graph, and the ExportedProgram that the graph was made of."""
    example = trace_inputs(inputs, free)
    with quiet():
        program = torch.onnx.export(
            caller,
            tuple(example.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(caller.outputs),
            dynamic_shapes=(tuple(free.names[name] for name in inputs),),
            opset_version=opset,
        )
        assert program is not None
        return program


def clean(proto: Any) -> None:
    """Take out what differs between machines: source paths, stack traces, and the prefix of the wrapper."""
    prefix = "model."
    proto.doc_string = ""
    del proto.metadata_props[:]
    for graph in graphs(proto.graph):
        graph.doc_string = ""
        values = [*graph.initializer, *graph.value_info, *graph.input, *graph.output]
        for item in [graph, *values, *graph.node]:
            item.doc_string = ""
            del item.metadata_props[:]
        for value in values:
            value.name = value.name.removeprefix(prefix)
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [name.removeprefix(prefix) for name in names]


def check_graph(proto: Any) -> None:
    """Refuse a graph that trains, draws random numbers, or has a fixed batch size.

    Raises:
        ExportError: naming the node or the input.
    """
    for graph in graphs(proto.graph):
        for node in graph.node:
            training = any(a.name == "training_mode" and a.i for a in node.attribute)
            if training or node.op_type == "Dropout" or node.op_type in RANDOM_NODES:
                raise ExportError(
                    f"the graph holds the training node {node.op_type} ({node.name}): look for dropout, batch "
                    "statistics or random numbers that forward uses whatever model.training says"
                )
    for value in [*proto.graph.input, *proto.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if not dims or not dims[0].dim_param:
            size = dims[0].dim_value if dims else "none"
            raise ExportError(
                f"the exported graph has a fixed batch size ({size}) in '{value.name}': in forward take sizes from "
                "the input, as in x.shape[0], never from a number"
            )


def cause(error: BaseException) -> str:
    """The first real cause of an exporter's error, on one line."""
    error = _root(error)
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    static = re.search(r"inferred a static shape of (\d+) for dimension .*?\.shape\[(\d+)\]", text)
    if static:
        return f"forward fixes dimension {static[2]} at {static[1]}"
    return f"{type(error).__name__}: {first_line(error)}{_place(error)}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log line, warning or print from the exporter. Errors still come as exceptions."""
    names = [n for n in logging.root.manager.loggerDict if n.split(".")[0] in CHATTY_LOGGERS]
    loggers = [logging.getLogger(name) for name in {*names, *CHATTY_LOGGERS}]
    # A child with no level of its own, also one that is made later, follows its parent.
    levels = {logger: logger.level for logger in loggers if logger.level or logger.name in CHATTY_LOGGERS}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL + 1)
        sink = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _place(error: BaseException) -> str:
    """The innermost line of the user's code that the error went through."""
    ours = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    # The exporter and Python's own context managers are no help; the line inside some forward is.
    inside = [f for f in frames if f.name == "forward"]
    return f" ({inside[-1].filename}, line {inside[-1].lineno}: {inside[-1].line})" if inside else ""


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _holds_packed(error: BaseException) -> bool:
    """Whether the error came from code that had a packed sequence in hand; its text does not say so."""
    frames = (frame for frame, _ in traceback.walk_tb(_root(error).__traceback__))
    return any(isinstance(value, PackedSequence) for frame in frames for value in frame.f_locals.values())


def _explained(error: Exception) -> ExportError:
    reason = cause(error)
    mend = next((mend for pattern, mend in MENDS if re.search(pattern, f"{reason} {error}")), DEFAULT_MEND)
    if _holds_packed(error):
        mend = PACKED_MEND
    return ExportError(f"the model cannot be exported to ONNX: {reason}. Mend: {mend}")
