"""The proof that an ONNX file does what the PyTorch model does, on the user's data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyft.core.files import write_json
from pyft.errors import ConfigError, DataError, ExportError
from pyft.export.run import OnnxModel, first_line

if TYPE_CHECKING:
    from pyft.samples import Batch

TOLERANCE = 1e-4
BATCH_SIZES = (1, 2, 7)
SMALL_BATCH = 8
MAX_LISTED_TIES = 100


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
        provider: the onnxruntime provider that ran.
        kept: where a file that failed was moved to, or None.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text for JSON; a value that is not finite becomes None."""
        return _finite(dataclasses.asdict(self))

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
    batches: Iterable[Batch],
    *,
    problem: str | None = None,
    classes: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
    report: str | os.PathLike[str] | None = None,
    raises: bool = True,
) -> Parity:
    """Compare every prediction of an ONNX file with the PyTorch model's, batch by batch.

    The first samples are run again in batches of 1, 2 and 7.

    Args:
        model_call: takes `Batch.inputs`, gives the PyTorch logits (B, ...) in eval mode. Runs without autograd.
        onnx_model: the opened file, or its path.
        batches: the validation data; one batch is in memory at a time.
        problem: "classification", "multilabel" or "regression"; default: what the file says, else classification.
        classes: where given, the names that the file must carry.
        tolerance: the largest relative difference of a logit that passes.
        report: where to write the result as JSON ("parity.json"), or None.
        raises: on a failure move the file to "<name>.failed.onnx" and raise; if False, only say so in the result.

    Raises:
        ExportError: the file cannot be opened; or it differs (a prediction, a logit beyond the tolerance, NaN, a
            batch size that does not run, other class names), naming the worst sample.
        DataError: no batch.
    """
    model = onnx_model if isinstance(onnx_model, OnnxModel) else OnnxModel(onnx_model)
    comparison = _Comparison(problem or model.meta.task or "classification", tolerance)
    failure = _classes_differ(model, classes)
    if failure is None:
        failure = _compare_all(model_call, model, batches, comparison)
    if failure is None and not comparison.num_samples:
        raise DataError("no batch was given, so nothing was compared: check that the validation data is not empty")
    parity = comparison.result(failure, model.provider)
    if not parity.passed and raises and model.path is not None and model.path.exists():
        kept = model.path.with_name(f"{model.path.stem}.failed.onnx")
        os.replace(model.path, kept)
        parity = dataclasses.replace(parity, kept=str(kept))
    if report is not None:
        write_json(report, parity.to_dict())
    if not parity.passed and raises:
        where = f". The file is kept as {parity.kept}" if parity.kept else ""
        raise ExportError(f"the ONNX file does not behave like the PyTorch model: {parity.failure}{where}")
    return parity


def relative_difference(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """max |a - b| / max |a| over a batch; 0 where both are all zeros, NaN where any value is.

    >>> relative_difference(np.array([2.0, -4.0]), np.array([2.0, -3.0]))
    0.25
    """
    if not reference.size:
        return 0.0
    return _relative(float(np.abs(reference - other).max()), float(np.abs(reference).max()))


def _compare_all(
    model_call: Callable[[Any], Any], model: OnnxModel, batches: Iterable[Batch], comparison: _Comparison
) -> str | None:
    """Compare all batches, the first also in small pieces. Gives the failure, or None."""
    for number, batch in enumerate(batches):
        pieces = [(batch.inputs, _numpy(batch.index))]
        if number == 0:
            pieces += [_take(batch, size) for size in BATCH_SIZES]
        for piece, (inputs, index) in enumerate(pieces):
            try:
                with _no_grad():
                    expected = _numpy(model_call(inputs))
            except Exception as error:
                return f"the PyTorch model does not run on a batch of {len(index)}: {first_line(error)}"
            try:
                given = model(inputs)
            except (ConfigError, ExportError) as error:
                return f"it does not run on a batch of {len(index)}: {error}"
            stop = comparison.add(expected, given, index, inputs, repeated=piece > 0)
            if stop is not None:
                return _unless_moving(model_call, inputs, expected) or stop
    failure = comparison.failure()
    if failure is None or comparison.worst_call is None:
        return failure
    return _unless_moving(model_call, *comparison.worst_call) or failure


def _unless_moving(model_call: Callable[[Any], Any], inputs: Any, expected: NDArray[Any]) -> str | None:
    """What to say when PyTorch differs with itself on these inputs, which is the usual cause of a failure."""
    with _no_grad():
        again = _numpy(model_call(inputs))
    if np.array_equal(expected, again, equal_nan=True):
        return None
    return (
        "the PyTorch model gives other logits each time for the same inputs, so nothing can be compared: call "
        "model.eval() first (dropout or batch statistics are on)"
    )


class _Comparison:
    """Running differences between two sets of logits."""

    def __init__(self, problem: str, tolerance: float) -> None:
        if problem not in ("classification", "multilabel", "regression"):
            raise ConfigError(f"problem must be 'classification', 'multilabel' or 'regression', got {problem!r}")
        self.problem = problem
        self.tolerance = tolerance
        self.num_samples = 0
        self.num_ties = 0
        self.ties: list[dict[str, Any]] = []
        self.worst: dict[str, Any] | None = None
        self.worst_call: tuple[Any, NDArray[Any]] | None = None
        self.max_abs = 0.0
        self._values = 0
        self._sum = 0.0
        self._rel = 0.0
        self._small_abs = 0.0
        self._scale = 0.0
        self._disagree = 0
        self._disagree_repeated = 0

    def add(
        self, expected: NDArray[Any], given: NDArray[Any], index: NDArray[Any], inputs: Any, *, repeated: bool
    ) -> str | None:
        """Compare one batch; gives a failure that makes going on pointless, or None."""
        if expected.shape != given.shape:
            return f"its logits have shape {given.shape} where PyTorch gives {expected.shape}"
        if expected.shape[:1] != (len(index),):
            return f"logits must have one row for each of {len(index)} samples, got shape {expected.shape}"
        a, b = (x.astype(np.float64).reshape(len(index), -1) for x in (expected, given))
        for name, values in (("PyTorch", a), ("ONNX", b)):
            if not np.isfinite(values).all():
                row = int((~np.isfinite(values).all(axis=1)).argmax())
                self.worst = _sample(index, row, a, b)
                self.max_abs = self._rel = math.nan
                return f"{name} gives NaN or inf for sample {index[row]}"
        difference = np.abs(a - b)
        largest, scale = float(difference.max(initial=0)), float(np.abs(a).max(initial=0))
        self._scale = max(self._scale, scale)
        if len(index) < SMALL_BATCH:
            self._small_abs, scale = max(self._small_abs, largest), self._scale
        else:
            self._rel = max(self._rel, _relative(largest, scale))
        if largest > self.max_abs or self.worst is None:
            self.max_abs = max(self.max_abs, largest)
            self.worst = _sample(index, int(difference.max(axis=1, initial=0).argmax()), a, b)
            self.worst_call = (inputs, expected)
        wrong = self._disagreements(expected, given, index, self.tolerance * scale, repeated)
        if repeated:
            self._disagree_repeated += wrong
            return None
        self._disagree += wrong
        self.num_samples += len(index)
        self._values += difference.size
        self._sum += float(difference.sum())
        return None

    def failure(self) -> str | None:
        """What is beyond the tolerance after all batches, or None."""
        if self.problem != "regression" and (self._disagree or self._disagree_repeated):
            count = f"{self._disagree:,} of {self.num_samples:,} predictions differ"
            if not self._disagree:
                count = f"predictions differ in batches of {', '.join(map(str, BATCH_SIZES))}"
            return f"{count}; {self._worst_line()}"
        if self.max_rel() > self.tolerance:
            return f"the relative difference is {self.max_rel():.1e}, above {self.tolerance:.0e}; {self._worst_line()}"
        return None

    def max_rel(self) -> float:
        """The largest relative difference, small batches measured by the largest logit of all."""
        return max(self._rel, _relative(self._small_abs, self._scale))

    def result(self, failure: str | None, provider: str) -> Parity:
        """All that was found."""
        return Parity(
            passed=failure is None,
            failure=failure,
            num_samples=self.num_samples,
            max_abs=self.max_abs,
            mean_abs=self._sum / max(self._values, 1),
            max_rel=self.max_rel(),
            tolerance=self.tolerance,
            agreement=1 - self._disagree / max(self.num_samples, 1),
            num_ties=self.num_ties,
            ties=self.ties,
            worst_sample=self.worst,
            batch_sizes=BATCH_SIZES,
            provider=provider,
        )

    def _disagreements(
        self, expected: NDArray[Any], given: NDArray[Any], index: NDArray[Any], allowed: float, repeated: bool
    ) -> int:
        """How many samples of a batch are predicted differently, ties listed and left out."""
        size = len(index)
        if self.problem == "regression":
            return int((np.abs(expected - given).reshape(size, -1) > allowed).any(axis=1).sum())
        if self.problem == "multilabel":
            differs, gap = (expected > 0) != (given > 0), np.abs(expected)
            first, second = expected > 0, given > 0
        else:
            first, second = expected.argmax(axis=-1), given.argmax(axis=-1)
            differs = first != second
            gap = (_pick(expected, first) - _pick(expected, second)) / 2
        # Each side may move by `allowed`: two logits may pass each other when they are twice that apart.
        decided = (differs & (gap > allowed)).reshape(size, -1).any(axis=1)
        tied = differs.reshape(size, -1).any(axis=1) & ~decided
        if not repeated:
            self.num_ties += int(tied.sum())
            for row in np.flatnonzero(tied)[: MAX_LISTED_TIES - len(self.ties)]:
                self.ties.append({"index": int(index[row]), "torch": _plain(first[row]), "onnx": _plain(second[row])})
        return int(decided.sum())

    def _worst_line(self) -> str:
        worst = self.worst or {}
        return (
            f"the worst is sample {worst.get('index')}, output {worst.get('output')}: PyTorch "
            f"{worst.get('torch'):.6g}, ONNX {worst.get('onnx'):.6g}"
        )


def _classes_differ(model: OnnxModel, classes: Sequence[str] | None) -> str | None:
    if classes is None or model.meta.classes == list(classes):
        return None
    return f"it carries the classes {_shorten(model.meta.classes)}, expected {_shorten(list(classes))}"


def _take(batch: Batch, size: int) -> tuple[Any, NDArray[Any]]:
    """The first `size` samples of a batch, taken again from the start where it has fewer."""
    index = _numpy(batch.index)
    rows = np.arange(size) % len(index)
    if isinstance(batch.inputs, Mapping):
        return {name: values[rows] for name, values in batch.inputs.items()}, index[rows]
    return batch.inputs[rows], index[rows]


def _sample(index: NDArray[Any], row: int, a: NDArray[Any], b: NDArray[Any]) -> dict[str, Any]:
    with np.errstate(invalid="ignore"):
        difference = np.abs(a[row] - b[row])
    output = int(np.where(np.isfinite(difference), difference, np.inf).argmax())
    return {
        "index": int(index[row]),
        "output": output,
        "torch": float(a[row, output]),
        "onnx": float(b[row, output]),
        "difference": float(difference[output]),
    }


def _pick(logits: NDArray[Any], choice: NDArray[Any]) -> NDArray[Any]:
    return np.take_along_axis(logits, choice[..., None], axis=-1)[..., 0]


def _relative(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf


def _plain(value: Any) -> Any:
    return np.asarray(value).astype(np.int64).tolist()


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
