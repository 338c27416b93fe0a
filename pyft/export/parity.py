"""The proof that an ONNX file does what the PyTorch model does, on the user's data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyft.core.files import write_json
from pyft.errors import ConfigError, DataError, ExportError
from pyft.export.comparison import Comparison, take_rows
from pyft.export.comparison import relative_difference as relative_difference
from pyft.export.file_outputs import outputs_differ, own_outputs
from pyft.export.provider import nodes_by_provider, provider_fault
from pyft.export.run import CPU, OnnxModel, first_line

if TYPE_CHECKING:
    from torch import nn

    from pyft.samples import Batch

TOLERANCE = 1e-4
BATCH_SIZES = (1, 2, 7)


class Feed(Protocol):
    """One batch as the file takes it."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Input name to array (B, ...)."""

    @property
    def index(self) -> Any:
        """(B,) int64 sample numbers."""


@dataclass(frozen=True)
class Known:
    """What an evaluation of the same samples has already computed, in the order of the sample numbers.

    Attributes:
        logits: (N, ...) of the PyTorch model, float32, computed on the CPU in eval mode.
        targets: (N, ...) or None.
    """

    logits: NDArray[Any]
    targets: NDArray[Any] | None = None


@dataclass(frozen=True)
class Parity:
    """How close an ONNX file is to the PyTorch model it came from.

    Attributes:
        passed: no failure was found.
        failure: what went wrong first, or None.
        num_samples: samples compared.
        max_abs, mean_abs: largest and mean absolute difference of the logits.
        max_rel: largest difference relative to the largest PyTorch logit of the same batch; batches of fewer
            than 8 samples, where that may be near 0 by chance, are measured by the largest logit of all.
        tolerance: the largest `max_rel` that passes.
        agreement: share of samples with the same prediction; a tie counts as the same. For regression: with
            values within the tolerance.
        num_ties, ties: predictions that differ where PyTorch itself is undecided within the tolerance
            (dicts of index, torch, onnx: the predicted class indexes); the first 100 are listed.
        worst_sample: dict of index (sample number), output (which logit), torch, onnx (its values) and
            difference; None before anything was compared.
        batch_sizes: sizes run besides those of the data.
        provider: the onnxruntime provider that ran, as the session says.
        kept: where a file that failed was moved to, or None.
        scores_max_abs, scores_mean_abs: as of the logits, of softmax or sigmoid; for regression of the outputs.
        metrics: {"torch": {name: value}, "onnx": {name: value}}, in which a tie counts as PyTorch has it; None where
            there were no targets.
        outputs: the file's own outputs beside the logits that were held against them.
        largest_batch: samples in the largest batch that ran.
        largest_inputs: input name to the largest size of each dimension that ran, the batch first.
        nodes_by_provider: provider to the number of graph nodes that it ran, as onnxruntime's profiler counted;
            empty where the file is not on disk.
        first_difference: the first node of the graph whose value differs, see `pyft.export.bisect`; None where nothing
            differs, or where no module was given.
        precision: what lower precision costs, see `pyft.export.precision.PrecisionTable.to_dict`; None for fp32.
    """

    passed: bool
    failure: str | None
    num_samples: int
    max_abs: float
    mean_abs: float
    max_rel: float
    tolerance: float
    agreement: float
    num_ties: int
    ties: list[dict[str, Any]]
    worst_sample: dict[str, Any] | None
    batch_sizes: tuple[int, ...]
    provider: str
    kept: str | None = None
    scores_max_abs: float = 0.0
    scores_mean_abs: float = 0.0
    metrics: dict[str, dict[str, float]] | None = None
    outputs: tuple[str, ...] = ()
    largest_batch: int = 0
    largest_inputs: dict[str, list[int]] = field(default_factory=dict)
    nodes_by_provider: dict[str, int] = field(default_factory=dict)
    first_difference: dict[str, Any] | None = None
    precision: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text for JSON; a value that is not finite becomes None."""
        return finite(dataclasses.asdict(self))

    def __str__(self) -> str:
        head = "ONNX and PyTorch agree" if self.passed else f"ONNX and PyTorch differ: {self.failure}"
        ties = f", {self.num_ties:,} ties" if self.num_ties else ""
        return (
            f"{head} ({self.num_samples:,} samples: same predictions {self.agreement:.2%}{ties}, "
            f"largest difference {self.max_abs:.1e}, relative {self.max_rel:.1e})"
        )


def check_parity(
    model_call: Callable[[Any], Any],
    onnx_model: OnnxModel | str | os.PathLike[str],
    batches: Iterable[Batch] | Callable[[NDArray[np.int64]], Batch],
    *,
    feeds: Iterable[Feed] | None = None,
    problem: str | None = None,
    classes: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
    report: str | os.PathLike[str] | None = None,
    raises: bool = True,
    provider: str | None = None,
    module: nn.Module | None = None,
    known: Known | None = None,
    counter: Callable[[], Any] | None = None,
    to_value: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    precision: Mapping[str, Any] | None = None,
) -> Parity:
    """Compare every prediction of an ONNX file with the PyTorch model's, batch by batch.

    The first samples are run again in batches of 1, 2 and 7. The file's own scores, labels and values are held against
    its logits and the class names.

    Args:
        model_call: takes `Batch.inputs`, gives the PyTorch logits (B, ...) in eval mode. Runs without autograd.
        onnx_model: the opened file, or its path.
        batches: the validation data after the training preprocessing; one batch is in memory at a time. With `feeds`,
            a function from sample numbers (B,) to the Batch of exactly those.
        feeds: the same samples as the file takes them (pictures as uint8, columns of a table, ...), where these
            are not `Batch.inputs`.
        problem: "classification", "multilabel" or "regression"; default: what the file says, else classification.
        classes: where given, the names that the file must carry.
        tolerance: the largest relative difference of a logit that passes.
        report: where to write the result as JSON ("parity.json"), or None.
        raises: on a failure move the file to "<name>.failed.onnx" and raise; if False, only say so in the result.
        provider: the onnxruntime provider that must have run; default: the one that the file was opened with.
        module: the module behind `model_call`: a part of it in train mode is named, and after a failure the first node
            of the graph whose value differs.
        known: logits that need not be computed again. The first batch is, and every batch in which they differ.
        counter: makes a running count of metrics: an object with `update(targets, logits)` and `metrics()`, whose
            `.values` is a dict of numbers. Every metric must be the same from both sides.
        to_value: for regression from logits to values in the unit of the targets; default: they are.
        precision: for a file in fp16 or int8 `PrecisionTable.to_dict()`, which goes into the result. Its logits,
            predictions and metrics are compared, but no difference in them is a failure, as the table bounds the drop.

    Raises:
        ExportError: the file cannot be opened; or it differs (a prediction, a logit beyond the tolerance, a metric,
            NaN, a batch size that does not run, an output or class names that say something else, another provider),
            naming the worst sample and the first node that differs.
        DataError: no batch.
    """
    path = onnx_model.path if isinstance(onnx_model, OnnxModel) else Path(onnx_model)
    proof = _Proof(model_call, to_value=to_value, known=known, module=module)
    try:
        model = onnx_model if isinstance(onnx_model, OnnxModel) else OnnxModel(onnx_model, provider=provider or CPU)
    except ExportError as error:
        comparison = Comparison(problem or "classification", tolerance)
        parity = proof.result(comparison, str(error), provider or "")
        return _end(dataclasses.replace(parity, failure=str(error)), path, report, raises, str(error))
    comparison = Comparison(
        problem or model.meta.task or "classification", tolerance, counter, to_value, precision is None
    )
    failure = _classes_differ(model, classes) or _trains(module) or provider_fault(model, provider)
    if failure is None:
        failure = proof.compare_all(model, comparison, _pairs(batches, feeds), classes)
    if failure is None and not comparison.num_samples:
        raise DataError("no batch was given, so nothing was compared: check that the validation data is not empty")
    if failure is None:
        failure = _training_node(model) or proof.count_nodes(model, provider)
    parity = proof.result(comparison, failure, model.provider)
    if precision is not None:
        parity = dataclasses.replace(parity, precision=dict(precision))
    if failure is not None and module is not None and comparison.differs():
        parity = _with_first_difference(parity, module, model, comparison)
    message = f"the ONNX file does not behave like the PyTorch model: {parity.failure}"
    return _end(parity, model.path, report, raises, message)


Call = tuple[Any, NDArray[np.int64], "Callable[[], Batch]"]
"""What the file is called with, the sample numbers, and how to get what PyTorch is called with."""


def _pairs(
    batches: Iterable[Batch] | Callable[[NDArray[np.int64]], Batch], feeds: Iterable[Feed] | None
) -> Iterator[Call]:
    if feeds is None:
        if callable(batches):
            raise ConfigError("batches: a function of sample numbers needs feeds=, which tell the numbers")
        for batch in batches:
            yield batch.inputs, _numpy(batch.index), lambda batch=batch: batch  # type: ignore[misc]
        return
    if not callable(batches):
        raise ConfigError("batches: with feeds= a function from sample numbers to a Batch is expected")
    for feed in feeds:
        index = np.asarray(feed.index, np.int64)
        yield feed.inputs, index, lambda index=index: _same_samples(batches(index), index)  # type: ignore[misc]


def _same_samples(batch: Batch, index: NDArray[np.int64]) -> Batch:
    if not np.array_equal(_numpy(batch.index), index):
        raise ConfigError("batches: the Batch holds other samples than it was asked for, or in another order")
    return batch


class _Proof:
    """One pass over the data, and what was seen on the way."""

    def __init__(
        self,
        model_call: Callable[[Any], Any],
        *,
        to_value: Callable[[NDArray[Any]], NDArray[Any]] | None,
        known: Known | None,
        module: nn.Module | None,
    ) -> None:
        self.model_call = model_call
        self.to_value = to_value
        self.known = known
        self.module = module
        self.outputs: tuple[str, ...] = ()
        self.largest_batch = 0
        self.largest_inputs: dict[str, list[int]] = {}
        self.nodes: dict[str, int] = {}
        self.first: Any = None

    def compare_all(
        self, model: OnnxModel, comparison: Comparison, calls: Iterator[Call], classes: Sequence[str] | None
    ) -> str | None:
        """Compare all batches, the first also in small pieces. Gives the failure, or None."""
        self.outputs = own_outputs(model)
        classes = model.meta.classes if classes is None else classes
        for number, (inputs, index, batch) in enumerate(calls):
            stop = self._compare(model, comparison, (inputs, index, batch), classes, afresh=number == 0)
            for size in BATCH_SIZES if number == 0 and stop is None else ():
                rows = np.arange(size) % len(index)
                piece = take_rows(inputs, rows), index[rows], lambda rows=rows, batch=batch: _take(batch(), rows)
                if stop is None:
                    stop = self._compare(model, comparison, piece, classes, repeated=True)
            if stop is not None:
                return stop
            if number == 0:
                self.first = take_rows(inputs, np.arange(1))
        failure = comparison.failure()
        if failure is None or comparison.worst_call is None:
            return failure
        return self._unless_moving(comparison.worst_call[0]) or failure

    def count_nodes(self, model: OnnxModel, provider: str | None) -> str | None:
        """Which provider ran the nodes of the graph; a failure where the one asked for ran none."""
        wanted = provider or model.provider
        self.nodes = nodes_by_provider(model, wanted, self.first)
        if self.nodes and wanted not in self.nodes:
            ran = ", ".join(f"{name} {count:,} nodes" for name, count in self.nodes.items())
            return f"{wanted} was asked for, but ran no node of the graph: {ran}"
        return None

    def result(self, comparison: Comparison, failure: str | None, provider: str) -> Parity:
        """All that was found."""
        return Parity(
            passed=failure is None,
            failure=failure,
            batch_sizes=BATCH_SIZES,
            provider=provider,
            outputs=self.outputs,
            largest_batch=self.largest_batch,
            largest_inputs=self.largest_inputs,
            nodes_by_provider=self.nodes,
            **comparison.figures(),
        )

    def _compare(
        self,
        model: OnnxModel,
        comparison: Comparison,
        call: Call,
        classes: Sequence[str] | None,
        *,
        afresh: bool = False,
        repeated: bool = False,
    ) -> str | None:
        inputs, index, batch = call
        try:
            given = model.run(inputs, [model.output, *self.outputs]) if self.outputs else {"": model(inputs)}
        except (ConfigError, ExportError) as error:
            return self._runs_in_torch(batch, index) or f"it does not run on a batch of {len(index)}: {error}"
        logits = given.pop(model.output if self.outputs else "")
        self._see(model, inputs, len(index))
        expected, targets, made = None, None, None
        if self.known is not None and not (afresh or repeated):
            expected, targets = self.known.logits[index], self.known.targets
            targets = None if targets is None else targets[index]
        if expected is None or not comparison.close(expected, logits):
            made = batch()
            try:
                with _no_grad():
                    expected = _numpy(self.model_call(made.inputs))
            except Exception as error:
                return f"the PyTorch model does not run on a batch of {len(index)}: {first_line(error)}"
            targets = None if made.targets is None else _numpy(made.targets)
        pair = (None if made is None else made.inputs, inputs)
        stop = comparison.add(expected, logits, index, pair, targets=targets, repeated=repeated)
        if stop is not None:
            return (None if made is None else self._unless_moving(made.inputs)) or stop
        if not given:
            return None
        return outputs_differ(
            {"logits": logits, **given}, expected, index, problem=comparison.problem, classes=classes,
            to_value=self.to_value, tolerance=comparison.tolerance,
        )  # fmt: skip

    def _runs_in_torch(self, batch: Callable[[], Batch], index: NDArray[np.int64]) -> str | None:
        """PyTorch's own failure on a batch, which is then the cause of the file's."""
        try:
            with _no_grad():
                self.model_call(batch().inputs)
        except Exception as error:
            return f"the PyTorch model does not run on a batch of {len(index)}: {first_line(error)}"
        return None

    def _see(self, model: OnnxModel, inputs: Any, size: int) -> None:
        self.largest_batch = max(self.largest_batch, size)
        named = inputs if isinstance(inputs, Mapping) else {self._lone(model): inputs}
        for name, values in named.items():
            shape, seen = list(values.shape), self.largest_inputs.get(name, [])
            same = len(seen) == len(shape)
            self.largest_inputs[name] = [max(pair) for pair in zip(shape, seen, strict=True)] if same else shape

    @staticmethod
    def _lone(model: OnnxModel) -> str:
        inputs = getattr(model, "inputs", ())
        return inputs[0].name if inputs else "input"

    def _unless_moving(self, inputs: Any) -> str | None:
        """What to say when PyTorch differs with itself on these inputs, which is the usual cause of a failure."""
        if inputs is None:
            return None
        with _no_grad():
            first, again = (_numpy(self.model_call(inputs)) for _ in range(2))
        if np.array_equal(first, again, equal_nan=True):
            return None
        return (
            "the PyTorch model gives other logits each time for the same inputs, so nothing can be compared: call "
            "model.eval() first (dropout or batch statistics are on)"
        )


def _with_first_difference(parity: Parity, module: nn.Module, model: OnnxModel, comparison: Comparison) -> Parity:
    from pyft.export.bisect import first_difference

    inputs, feed, row = comparison.worst_call or (None, None, 0)
    if inputs is None or model.path is None:
        return parity
    try:
        found = first_difference(module, model.path, inputs, feed, row, provider=model.provider)
    except Exception as error:
        # The failure itself must be told, whatever happens on the way to its cause.
        reason = f"{parity.failure}; the first node that differs could not be looked for: {first_line(error)}"
        return dataclasses.replace(parity, failure=reason)
    if found is None:
        return parity
    failure = f"{parity.failure}; {found}"
    return dataclasses.replace(parity, failure=failure, first_difference=found.to_dict())


def _end(parity: Parity, path: Path | None, report: Any, raises: bool, message: str) -> Parity:
    """Move a file that failed, write the report, raise."""
    if not parity.passed and raises and path is not None and path.exists():
        kept = path.with_name(f"{path.stem}.failed.onnx")
        os.replace(path, kept)
        parity = dataclasses.replace(parity, kept=str(kept))
    if report is not None:
        write_json(report, parity.to_dict())
    if not parity.passed and raises:
        raise ExportError(f"{message}. The file is kept as {parity.kept}" if parity.kept else message)
    return parity


def _classes_differ(model: OnnxModel, classes: Sequence[str] | None) -> str | None:
    if classes is None or model.meta.classes == list(classes):
        return None
    return f"it carries the classes {_shorten(model.meta.classes)}, expected {_shorten(list(classes))}"


def _trains(module: nn.Module | None) -> str | None:
    """A part that gives other values in train mode; it would also follow the statistics of the data compared."""
    if module is None:
        return None
    from torch.nn.modules import batchnorm, dropout

    kinds = (batchnorm._NormBase, dropout._DropoutNd)
    parts = [(name, part) for name, part in module.named_modules() if part.training and isinstance(part, kinds)]
    if not parts:
        return None
    name, part = parts[0]
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    return f"the PyTorch model is in train mode: '{name}' ({type(part).__name__}){more}: call model.eval() first"


def _training_node(model: OnnxModel) -> str | None:
    """onnxruntime runs such a node as in evaluation, others do not."""
    if model.path is None or not model.path.is_file():
        return None
    from pyft.export.bisect import training_node

    found = training_node(model.path)
    return None if found is None else str(found)


def _take(batch: Batch, rows: NDArray[np.int64]) -> Batch:
    targets = None if batch.targets is None else batch.targets[rows]
    return dataclasses.replace(batch, inputs=take_rows(batch.inputs, rows), targets=targets, index=batch.index[rows])


def _numpy(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() and values.element_size() < 4 else values).numpy()
    return np.asarray(values)


def _no_grad() -> contextlib.AbstractContextManager[Any]:
    torch = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None else torch.no_grad()


def _shorten(names: list[str] | None) -> str:
    text = str(names)
    return text if len(text) <= 100 else text[:97] + "..."


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
