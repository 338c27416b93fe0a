"""Running differences between the logits of PyTorch and those of an ONNX file, one batch in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import ConfigError

PROBLEMS = ("classification", "multilabel", "regression")
SMALL_BATCH = 8
MAX_LISTED_TIES = 100
METRIC_TOLERANCE = 1e-3
"""By how much a mean over real numbers (loss, rmse, ...) may differ, relatively; a count may not differ at all."""


def relative_difference(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """max |a - b| / max |a| over a batch; 0 where both are all zeros, NaN where any value is.

    >>> relative_difference(np.array([2.0, -4.0]), np.array([2.0, -3.0]))
    0.25
    """
    if not reference.size:
        return 0.0
    return relative(float(np.abs(reference - other).max()), float(np.abs(reference).max()))


def relative(difference: float, scale: float) -> float:
    """difference / scale; 0 where the difference is, inf where only the scale is."""
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf


def scores_of(logits: NDArray[Any], problem: str) -> NDArray[np.float64]:
    """What a user reads, in float64: softmax over the last dimension, sigmoid, or the value itself for regression."""
    wide = logits.astype(np.float64)
    if problem == "regression":
        return wide
    if problem == "multilabel":
        return 0.5 * (1 + np.tanh(wide / 2))
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


class Comparison:
    """All differences of two sides, counted batch by batch.

    Args:
        problem: "classification", "multilabel" or "regression".
        tolerance: the largest relative difference of a logit that passes.
        counter: makes a running count of metrics: an object with `update(targets, logits)` and `metrics()`, whose
            `.values` is a dict of name to number. None: no metrics.
        to_value: for regression from the model's outputs to values in the unit of the targets.
        bounded: False: differences are counted, but are no failure.
    """

    def __init__(
        self,
        problem: str,
        tolerance: float,
        counter: Callable[[], Any] | None = None,
        to_value: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
        bounded: bool = True,
    ) -> None:
        if problem not in PROBLEMS:
            raise ConfigError(f"problem must be 'classification', 'multilabel' or 'regression', got {problem!r}")
        self.problem = problem
        self.tolerance = tolerance
        self.bounded = bounded
        self.num_samples = 0
        self.num_ties = 0
        self.ties: list[dict[str, Any]] = []
        self.worst: dict[str, Any] | None = None
        self.worst_call: tuple[Any, Any, int] | None = None
        self.max_abs = 0.0
        self.scores_max_abs = 0.0
        self._values = 0
        self._sum = 0.0
        self._scores_sum = 0.0
        self._rel = 0.0
        self._small_abs = 0.0
        self._scale = 0.0
        self._disagree = 0
        self._disagree_repeated: set[int] = set()
        self._to_value = to_value or (lambda logits: logits)
        self._counters = None if counter is None else {"torch": counter(), "onnx": counter()}

    def close(self, expected: NDArray[Any], given: NDArray[Any]) -> bool:
        """Whether a batch is plainly the same: within the tolerance, and every prediction equal; True if unbounded."""
        if expected.shape != given.shape or not np.isfinite(expected).all() or not np.isfinite(given).all():
            return False
        if not self.bounded:
            return True
        same = np.array_equal(_predicted(expected, self.problem), _predicted(given, self.problem))
        return (same or self.problem == "regression") and relative_difference(expected, given) <= self.tolerance

    def add(
        self,
        expected: NDArray[Any],
        given: NDArray[Any],
        index: NDArray[Any],
        call: tuple[Any, Any],
        *,
        targets: NDArray[Any] | None = None,
        repeated: bool = False,
    ) -> str | None:
        """Compare one batch; gives a failure that makes going on pointless, or None.

        Args:
            expected, given: (B, ...) logits of PyTorch and of the file.
            index: (B,) sample numbers.
            call: what PyTorch and the file were called with, kept for the worst sample.
            targets: (B, ...) for the metrics, or None.
            repeated: the samples were counted before, in another batch size.
        """
        if expected.shape != given.shape:
            return f"its logits have shape {given.shape} where PyTorch gives {expected.shape}"
        if expected.shape[:1] != (len(index),):
            return f"logits must have one row for each of {len(index)} samples, got shape {expected.shape}"
        a, b = (x.astype(np.float64).reshape(len(index), -1) for x in (expected, given))
        for name, values in (("PyTorch", a), ("ONNX", b)):
            if not np.isfinite(values).all():
                row = int((~np.isfinite(values).all(axis=1)).argmax())
                self.worst, self.worst_call = _sample(index, row, a, b), (*call, row)
                self.max_abs = self._rel = math.nan
                return f"{name} gives NaN or inf for sample {index[row]}"
        difference = np.abs(a - b)
        largest, scale = float(difference.max(initial=0)), float(np.abs(a).max(initial=0))
        self._scale = max(self._scale, scale)
        if len(index) < SMALL_BATCH:
            self._small_abs, scale = max(self._small_abs, largest), self._scale
        else:
            self._rel = max(self._rel, relative(largest, scale))
        if largest > self.max_abs or self.worst is None:
            self.max_abs = max(self.max_abs, largest)
            row = int(difference.max(axis=1, initial=0).argmax())
            self.worst, self.worst_call = _sample(index, row, a, b), (*call, row)
        decided, tied = self._disagreements(expected, given, index, self.tolerance * scale, repeated)
        if repeated:
            self._disagree_repeated |= {len(index)} if decided.any() else set()
            return None
        self._disagree += int(decided.sum())
        self.num_samples += len(index)
        self._values += difference.size
        self._sum += float(difference.sum())
        moved = np.abs(scores_of(expected, self.problem) - scores_of(given, self.problem))
        self.scores_max_abs = max(self.scores_max_abs, float(moved.max(initial=0)))
        self._scores_sum += float(moved.sum())
        self._count(expected, given, targets, tied)
        return None

    def failure(self) -> str | None:
        """What is beyond the tolerance after all batches, or None."""
        if not self.bounded:
            return None
        if self.problem != "regression" and (self._disagree or self._disagree_repeated):
            count = f"{self._disagree:,} of {self.num_samples:,} predictions differ"
            if not self._disagree:
                count = f"predictions differ in batches of {', '.join(map(str, sorted(self._disagree_repeated)))}"
            return f"{count}; {self._worst_line()}"
        if self.max_rel() > self.tolerance:
            return f"the relative difference is {self.max_rel():.1e}, above {self.tolerance:.0e}; {self._worst_line()}"
        return self._metrics_differ()

    def differs(self) -> bool:
        """Whether logits are beyond the tolerance, or not finite: there is a place in the graph where that begins."""
        return math.isnan(self.max_abs) or self.failure() is not None

    def max_rel(self) -> float:
        """The largest relative difference, small batches measured by the largest logit of all."""
        return max(self._rel, relative(self._small_abs, self._scale))

    def metrics(self) -> dict[str, dict[str, float]] | None:
        """{"torch": {name: value}, "onnx": {name: value}}; None without targets."""
        if self._counters is None or not self.num_samples:
            return None
        return {side: dict(counter.metrics().values) for side, counter in self._counters.items()}

    def figures(self) -> dict[str, Any]:
        """All that was found, by the names of `Parity`."""
        return {
            "num_samples": self.num_samples,
            "max_abs": self.max_abs,
            "mean_abs": self._sum / max(self._values, 1),
            "max_rel": self.max_rel(),
            "tolerance": self.tolerance,
            "scores_max_abs": self.scores_max_abs,
            "scores_mean_abs": self._scores_sum / max(self._values, 1),
            "agreement": 1 - self._disagree / max(self.num_samples, 1),
            "num_ties": self.num_ties,
            "ties": self.ties,
            "worst_sample": self.worst,
            "metrics": self.metrics(),
        }

    def _disagreements(
        self, expected: NDArray[Any], given: NDArray[Any], index: NDArray[Any], allowed: float, repeated: bool
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which samples of a batch are predicted differently, and which only as a tie; ties are listed."""
        size = len(index)
        if self.problem == "regression":
            beyond = (np.abs(expected - given).reshape(size, -1) > allowed).any(axis=1)
            return beyond, np.zeros(size, np.bool_)
        first, second = (_predicted(logits, self.problem) for logits in (expected, given))
        differs = first != second
        if self.problem == "multilabel":
            gap = np.abs(expected)
        else:
            gap = (_pick(expected, first) - _pick(expected, second)) / 2
        # Each side may move by `allowed`: two logits may pass each other when they are twice that apart.
        decided = (differs & (gap > allowed)).reshape(size, -1).any(axis=1)
        tied = differs.reshape(size, -1).any(axis=1) & ~decided
        if not repeated:
            self.num_ties += int(tied.sum())
            for row in np.flatnonzero(tied)[: MAX_LISTED_TIES - len(self.ties)]:
                self.ties.append({"index": int(index[row]), "torch": _plain(first[row]), "onnx": _plain(second[row])})
        return decided, tied

    def _count(
        self, expected: NDArray[Any], given: NDArray[Any], targets: NDArray[Any] | None, tied: NDArray[np.bool_]
    ) -> None:
        if self._counters is None:
            return
        if targets is None:
            self._counters = None
            return
        if tied.any():
            # A tie is no difference, so it must not be one in a metric either.
            given = np.where(tied.reshape(-1, *[1] * (given.ndim - 1)), expected, given)
        for side, logits in (("torch", expected), ("onnx", given)):
            values = self._to_value(logits) if self.problem == "regression" else logits
            self._counters[side].update(targets, values)

    def _metrics_differ(self) -> str | None:
        found = self.metrics()
        for name, value in (found or {"torch": {}})["torch"].items():
            other = found["onnx"][name]  # type: ignore[index]
            if math.isnan(value) and math.isnan(other):
                continue
            allowed = 1e-12
            if self.problem == "regression" or name == "loss":
                allowed = METRIC_TOLERANCE * max(abs(value), 1.0 if name == "r2" else 0.0) + 2 * self.max_abs
            if not abs(value - other) <= allowed:
                return f"the metric {name} is {value:.9g} with PyTorch and {other:.9g} with ONNX"
        return None

    def _worst_line(self) -> str:
        worst = self.worst or {}
        return (
            f"the worst is sample {worst.get('index')}, output {worst.get('output')}: PyTorch "
            f"{worst.get('torch'):.6g}, ONNX {worst.get('onnx'):.6g}"
        )


def take_rows(inputs: Any, rows: Sequence[int] | NDArray[np.int64]) -> Any:
    """Rows of a batch, Tensor or array or a dict of them."""
    if isinstance(inputs, Mapping):
        return {name: values[rows] for name, values in inputs.items()}
    return inputs[rows]


def _predicted(logits: NDArray[Any], problem: str) -> NDArray[Any]:
    return logits > 0 if problem == "multilabel" else logits.argmax(axis=-1)


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


def _plain(value: Any) -> Any:
    return np.asarray(value).astype(np.int64).tolist()
