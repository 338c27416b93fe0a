"""Two models on the same samples: differences of metrics with bootstrap intervals, and McNemar's test. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import ConfigError, DataError
from pyft.evaluation.metrics import class_names
from pyft.evaluation.table import fit
from pyft.evaluation.values import classification_values, multilabel_values, regression_values

AUTO = {
    "classification": ("accuracy", "macro_f1"),
    "multilabel": ("exact_match", "micro_f1", "macro_f1"),
    "regression": ("rmse", "mae", "r2"),
}
"""The metrics that are compared where none is named."""

EXACT = 1000
"""Up to this many samples that one model alone has right, McNemar's test is exact; above, chi-square."""

CHUNK = 4_000_000
"""Weights of resampled samples that are in memory at a time, 32 MB."""

SHOWN = 10


@dataclass(frozen=True)
class Difference:
    """One metric of both models.

    Attributes:
        metric: its name.
        a, b: of the two models.
        difference: b - a.
        low, high: ends of the confidence interval of the difference.
    """

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of whether two models are right equally often.

    Attributes:
        both, only_a, only_b, neither: samples that are right in both models, in one alone, in none.
        p_value: of the hypothesis that a sample which one model alone has right is as likely to be a's as b's.
        method: "exact" (binomial, two-sided), or "chi-square" with Edwards' continuity correction for more than 1,000
            such samples.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float
    method: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `pyft.compare` found; printed as a short table.

    Attributes:
        problem: "classification", "multilabel" or "regression".
        names: of the models a and b.
        num_samples: how many samples were compared.
        differences: one for each metric.
        confidence: of the intervals.
        mcnemar: None for regression.
        num_disagreeing: samples that the models predict differently; for regression, None.
        disagreeing: the first of them: dicts of row (counted from 0), true, a, b; for regression those whose
            predictions lie farthest apart.
    """

    problem: str
    names: tuple[str, str]
    num_samples: int
    differences: list[Difference]
    confidence: float
    mcnemar: McNemar | None = None
    num_disagreeing: int | None = None
    disagreeing: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, metric: str) -> Difference:
        """The difference in one metric.

        Raises:
            ConfigError: it was not compared.
        """
        found = next((one for one in self.differences if one.metric == metric), None)
        if found is None:
            there = ", ".join(one.metric for one in self.differences)
            raise ConfigError(f"no metric named {metric!r} was compared; there are: {there}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text for JSON; a value that is not finite becomes None."""

        def plain(values: dict[str, Any]) -> dict[str, Any]:
            return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

        return {
            "problem": self.problem,
            "a": self.names[0],
            "b": self.names[1],
            "num_samples": self.num_samples,
            "confidence": self.confidence,
            "differences": [plain({**vars(one), "significant": one.significant}) for one in self.differences],
            "mcnemar": None if self.mcnemar is None else dict(vars(self.mcnemar)),
            "num_disagreeing": self.num_disagreeing,
            "disagreeing": [plain(row) for row in self.disagreeing],
        }

    def __str__(self) -> str:
        size = f"{self.num_samples:,} sample{'s' * (self.num_samples != 1)}"
        lines = [f"{self.problem}: {size}", f"a: {self.names[0]}", f"b: {self.names[1]}", ""]
        interval = f"{self.confidence * 100:g} % interval of b - a"
        lines.append(f"{'':<18}{'a':>10}{'b':>10}{'b - a':>10}  {interval}")
        for one in self.differences:
            numbers = f"{_number(one.a):>10}{_number(one.b):>10}{_number(one.difference, sign=True):>10}"
            ends = f"{_number(one.low, sign=True)} to {_number(one.high, sign=True)}"
            lines.append(f"{one.metric.replace('_', ' '):<18}{numbers}  {ends}")
        if self.mcnemar is not None:
            test = self.mcnemar
            lines += ["", f"right in a alone: {test.only_a:,}, in b alone: {test.only_b:,}; "]
            lines[-1] += f"McNemar's test ({test.method}): p = {test.p_value:.3g}"
        if self.disagreeing:
            lines += ["", *self._disagreeing_lines()]
        return "\n".join(lines)

    def _disagreeing_lines(self) -> list[str]:
        shown = len(self.disagreeing)
        if self.num_disagreeing is None:
            title = f"the {shown} samples predicted farthest apart"
        else:
            title = f"predicted differently: {self.num_disagreeing:,} of {self.num_samples:,}"
            title += f", the first {shown}" if shown < self.num_disagreeing else ""
        head = f"{'row':>8}  {'true':<20}  {'a':<20}  b"
        rows = [
            f"{row['row']:>8}  {_cell(row['true']):<20}  {_cell(row['a']):<20}  {_cell(row['b'])}"
            for row in self.disagreeing
        ]
        return [title, head, *rows]


def compare_predictions(
    targets: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any],
    problem: str,
    classes: Sequence[str] | int | None = None,
    *,
    metric: str | Sequence[str] = "auto",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    shown: int = SHOWN,
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Compare two models by their predictions for the same samples.

    The interval is the percentile interval of the paired bootstrap: samples are drawn with replacement, both models
    are measured on the same draw, and the difference is kept. Efron and Tibshirani, "An Introduction to the
    Bootstrap" (1993), chapter 13. McNemar, "Note on the sampling error of the difference between correlated
    proportions" (1947); the correction is Edwards' (1948). For multilabel a sample is right where all its labels are.

    Args:
        targets, a, b: classification: (N,) class index. Multilabel: (N, C) of 0 and 1. Regression: (N,) or (N, K).
        problem: "classification", "multilabel" or "regression".
        classes: names, or their number; None for regression.
        metric: one name or several; "auto": see `AUTO`.
        resamples: draws of the bootstrap.
        confidence: of the intervals, between 0 and 1.
        seed: of the bootstrap.
        shown: how many disagreeing samples are listed.
        names: of the two models.

    Raises:
        ConfigError: an unknown problem or metric, or a number out of its range.
        DataError: no sample, or sizes that differ.

    >>> found = compare_predictions(np.array([0, 1, 1]), np.array([0, 1, 0]), np.array([0, 1, 1]), "classification", 2)
    >>> round(found["accuracy"].difference, 4), found.mcnemar.only_b
    (0.3333, 1)
    """
    _check_numbers(resamples, confidence)
    targets, a, b = (np.asarray(values) for values in (targets, a, b))
    if not len(targets):
        raise DataError("no sample was given, so there is nothing to compare: check that the data set is not empty")
    if not targets.size == a.size == b.size or not len(targets) == len(a) == len(b):
        raise DataError(f"targets and predictions must have one size, got {targets.shape}, {a.shape}, {b.shape}")
    if problem == "classification":
        pair: _Pair = _ClassPair(targets, a, b, len(class_names(classes or 0)))
    elif problem == "multilabel":
        pair = _LabelPair(targets.astype(bool), a.astype(bool), b.astype(bool))
    elif problem == "regression":
        pair = _ValuePair(*(values.reshape(len(values), -1).astype(np.float64) for values in (targets, a, b)))
    else:
        raise ConfigError(f"problem must be 'classification', 'multilabel' or 'regression', got {problem!r}")
    wanted = _metric_names(metric, problem, pair)
    right = pair.right()
    rows, count = pair.disagreeing(shown)
    labels = None if problem == "regression" else class_names(classes or targets.shape[-1])
    return Comparison(
        problem,
        names,
        len(targets),
        _differences(pair, wanted, resamples, confidence, np.random.default_rng(seed)),
        confidence,
        None if right is None else mcnemar(*right),
        count,
        [{"row": row, **_named_row(targets[row], a[row], b[row], problem, labels)} for row in rows],
    )


def mcnemar(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> McNemar:
    """McNemar's test of paired answers.

    Args:
        right_a, right_b: (N,) whether each model has each sample right.

    >>> mcnemar(np.array([True] * 8 + [False]), np.array([False] * 8 + [True])).p_value
    0.0390625
    """
    both, neither = int((right_a & right_b).sum()), int((~right_a & ~right_b).sum())
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    total = only_a + only_b
    if total <= EXACT:
        # Whole numbers until the division, so that no digit is lost.
        tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
        return McNemar(both, only_a, only_b, neither, min(1.0, 2 * tail / 2**total), "exact")
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / total
    return McNemar(both, only_a, only_b, neither, math.erfc(math.sqrt(statistic / 2)), "chi-square")


def _check_numbers(resamples: Any, confidence: Any) -> None:
    if isinstance(resamples, bool) or not isinstance(resamples, int | np.integer) or resamples < 1:
        raise ConfigError(f"resamples={resamples!r}: expected a whole number of 1 or more")
    if not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence!r}: expected a number between 0 and 1, such as 0.95")


def _metric_names(metric: str | Sequence[str], problem: str, pair: _Pair) -> list[str]:
    if metric == "auto":
        return list(AUTO[problem])
    wanted = [metric] if isinstance(metric, str) else list(metric)
    there = pair.values(np.ones((1, pair.num_cells)) * pair.counts)[0]
    unknown = [name for name in wanted if name not in there]
    if unknown or not wanted:
        raise ConfigError(
            f"metric={metric!r}: expected 'auto' or one of {', '.join(there)} for {problem}"
            + ("; the loss needs all logits, which are not kept" if unknown == ["loss"] else "")
        )
    return wanted


def _differences(
    pair: _Pair, wanted: Sequence[str], resamples: int, confidence: float, generator: np.random.Generator
) -> list[Difference]:
    found = pair.values(pair.counts[None].astype(np.float64))
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in wanted}
    for weights in _draws(pair, resamples, generator):
        a, b = pair.values(weights)
        for name in wanted:
            drawn[name].append(b[name] - a[name])
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    differences = []
    for name in wanted:
        first, second = (float(values[name][0]) for values in found)
        low, high = np.quantile(np.concatenate(drawn[name]), tails).tolist()
        differences.append(Difference(name, first, second, second - first, low, high))
    return differences


def _draws(pair: _Pair, resamples: int, generator: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """How often each cell is drawn, (R, cells) for some of the resamples at a time.

    Samples of one cell are alike, so that drawing N samples is drawing from a multinomial distribution.
    """
    count, cells = int(pair.counts.sum()), pair.num_cells
    step = max(1, CHUNK // max(cells, 1))
    for start in range(0, resamples, step):
        yield generator.multinomial(count, pair.counts / count, size=min(step, resamples - start)).astype(np.float64)


# ---------------------------------------------------------------- what the resampling needs of each problem

Values = dict[str, NDArray[np.float64]]


class _ClassPair:
    """Single-label classification; samples with one target and one pair of predictions are one cell."""

    def __init__(self, targets: NDArray[Any], a: NDArray[Any], b: NDArray[Any], size: int) -> None:
        for name, values in (("targets", targets), ("a", a), ("b", b)):
            if values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= size:
                raise DataError(f"{name}: expected (N,) class index 0..{size - 1}, got {values.dtype} {values.shape}")
        self.size = size
        self.rows = (targets, a, b)
        cells, self.counts = np.unique(np.stack([targets, a, b]).astype(np.int64), axis=1, return_counts=True)
        self.target, self.a, self.b = cells
        self.num_cells = len(self.counts)

    def values(self, weights: NDArray[np.float64]) -> tuple[Values, Values]:
        support = _by_class(weights, self.target, self.size)
        found = []
        for predicted in (self.a, self.b):
            right = self.target == predicted
            correct = _by_class(weights[:, right], predicted[right], self.size)
            found.append(classification_values(correct, support, _by_class(weights, predicted, self.size)))
        return found[0], found[1]

    def right(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        targets, a, b = self.rows
        return a == targets, b == targets

    def disagreeing(self, shown: int) -> tuple[list[int], int]:
        found = np.flatnonzero(self.rows[1] != self.rows[2])
        return found[:shown].tolist(), len(found)


class _LabelPair:
    """Multilabel classification; every sample is a cell."""

    def __init__(self, targets: NDArray[np.bool_], a: NDArray[np.bool_], b: NDArray[np.bool_]) -> None:
        if targets.ndim != 2 or targets.shape != a.shape or targets.shape != b.shape:
            raise DataError(f"targets, a, b: expected (N, C) each, got {targets.shape}, {a.shape}, {b.shape}")
        self.rows = (targets, a, b)
        self.num_cells = len(targets)
        self.counts = np.ones(self.num_cells, np.int64)

    def values(self, weights: NDArray[np.float64]) -> tuple[Values, Values]:
        targets, a, b = self.rows
        total, support = weights.sum(axis=1), weights @ targets.astype(np.float64)
        found = []
        for predicted in (a, b):
            correct = weights @ (targets & predicted).astype(np.float64)
            exact = weights @ (targets == predicted).all(axis=1).astype(np.float64)
            said = weights @ predicted.astype(np.float64)
            found.append(multilabel_values(correct, support, said, exact, total))
        return found[0], found[1]

    def right(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        targets, a, b = self.rows
        return (a == targets).all(axis=1), (b == targets).all(axis=1)

    def disagreeing(self, shown: int) -> tuple[list[int], int]:
        found = np.flatnonzero((self.rows[1] != self.rows[2]).any(axis=1))
        return found[:shown].tolist(), len(found)


class _ValuePair:
    """Regression; every sample is a cell."""

    def __init__(self, targets: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        for name, values in (("targets", targets), ("a", a), ("b", b)):
            if not np.isfinite(values).all():
                raise DataError(f"{name}: {int((~np.isfinite(values)).any(axis=1).sum())} rows are not finite")
        self.rows = (targets, a, b)
        self.num_cells = len(targets)
        self.counts = np.ones(self.num_cells, np.int64)
        # Sums of squares about the mean of all samples lose no digits to a large mean.
        self.centred = targets - targets.mean(axis=0)

    def values(self, weights: NDArray[np.float64]) -> tuple[Values, Values]:
        total = len(self.centred)
        mean = weights @ self.centred / total
        variation = weights @ self.centred**2 - total * mean**2
        # A draw of equal targets leaves nothing but rounding.
        constant = variation <= 1e-12 * (weights @ self.centred**2)
        found = []
        for predicted in self.rows[1:]:
            error = predicted - self.rows[0]
            found.append(regression_values(weights @ error**2, weights @ np.abs(error), variation, constant, total))
        return found[0], found[1]

    def right(self) -> None:
        return None

    def disagreeing(self, shown: int) -> tuple[list[int], None]:
        apart = np.abs(self.rows[1] - self.rows[2]).max(axis=1)
        order = np.argsort(-apart, kind="stable")[:shown]
        return [row for row in order.tolist() if apart[row] > 0], None


_Pair = _ClassPair | _LabelPair | _ValuePair


def _by_class(weights: NDArray[np.float64], index: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """(R, cells) summed by class to (R, size)."""
    sums = np.zeros((len(weights), size))
    if not len(index):
        return sums
    order = np.argsort(index, kind="stable")
    begins = np.flatnonzero(np.diff(index[order], prepend=-1))
    sums[:, index[order][begins]] = np.add.reduceat(weights[:, order], begins, axis=1)
    return sums


# ---------------------------------------------------------------- text


def _named_row(target: Any, a: Any, b: Any, problem: str, names: Sequence[str] | None) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if problem == "classification" and names is not None:
            return names[int(value)]
        if problem == "multilabel" and names is not None:
            return [name for name, one in zip(names, value, strict=True) if one]
        return float(np.ravel(value)[0]) if np.size(value) == 1 else np.asarray(value, np.float64).tolist()

    return {"true": plain(target), "a": plain(a), "b": plain(b)}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        value = ", ".join(one if isinstance(one, str) else f"{one:.6g}" for one in value) or "-"
    return fit(str(value), 20)


def _number(value: float, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if abs(value) < 1000 else f"{value:{plus}.3g}"
