"""What a report needs of the scores of held-out samples, kept while they stream by, in bounded memory."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyft.evaluation.calibration import CalibrationCounter
from pyft.evaluation.metrics import class_names
from pyft.evaluation.scores import binary_cross_entropy, cross_entropy, sigmoid, softmax

if TYPE_CHECKING:
    from pyft.evaluation.predict import Predictions

WORST = 24
POINTS = 2000
MAX_LABELS = 8
"""Of one sample's labels, so many are named."""


class HeldOut:
    """Calibration, the worst samples and, for regression, points to draw: `update` with each batch, then `to_dict`.

    Args:
        problem: "classification", "multilabel" or "regression".
        classes: names or number of the classes; None for regression.
        worst: samples of highest loss (regression: of largest error) that are kept.
        points: pairs of true and predicted value that are kept; of more samples an even part.
    """

    def __init__(
        self, problem: str, classes: Sequence[str] | int | None = None, *, worst: int = WORST, points: int = POINTS
    ) -> None:
        self.problem = problem
        self.names = [] if problem == "regression" else class_names(classes or 0)
        self.worst = worst
        self.points = points
        self.num_samples = 0
        self.calibration = CalibrationCounter(groups=len(self.names) if problem == "multilabel" else 1)
        self._worst: list[tuple[float, int, dict[str, Any]]] = []
        self._points: list[tuple[int, int, tuple[float, float]]] = []

    def update(self, found: Predictions) -> None:
        """Take note of one batch of labelled predictions, whose logits are finite."""
        assert found.targets is not None
        self.num_samples += len(found.index)
        take = {"classification": self._classes, "multilabel": self._labels, "regression": self._values}
        take[self.problem](np.asarray(found.logits, np.float64), found.targets, found.index)

    def to_dict(self) -> dict[str, Any]:
        """All that was kept, for JSON: problem, num_samples, worst, and calibration or points."""
        worst = [entry for _, _, entry in sorted(self._worst, key=lambda one: (-one[0], -one[1]))]
        kept: dict[str, Any] = {"problem": self.problem, "num_samples": self.num_samples, "worst": worst}
        if self.problem == "regression":
            kept["points"] = [list(pair) for _, _, pair in sorted(self._points, key=lambda one: one[1], reverse=True)]
        elif self.num_samples:
            kept["calibration"] = self.calibration.calibration().to_dict()
            if self.problem == "multilabel":
                kept["label_ece"] = [self.calibration.calibration(i).ece for i in range(len(self.names))]
        return kept

    def _classes(self, logits: NDArray[Any], targets: NDArray[Any], index: NDArray[Any]) -> None:
        scores, losses = softmax(logits), cross_entropy(logits, targets)
        best, rows = logits.argmax(axis=1), np.arange(len(logits))
        self.calibration.update(scores[rows, best], best == targets)
        for row in self._candidates(losses, index):
            self._keep(
                losses[row], index[row],
                true=self.names[targets[row]], predicted=self.names[best[row]], score=float(scores[row, best[row]]),
                true_score=float(scores[row, targets[row]]), wrong=bool(best[row] != targets[row]),
            )  # fmt: skip

    def _labels(self, logits: NDArray[Any], targets: NDArray[Any], index: NDArray[Any]) -> None:
        scores, losses = sigmoid(logits), binary_cross_entropy(logits, targets).mean(axis=1)
        for label in range(len(self.names)):
            self.calibration.update(scores[:, label], targets[:, label], label)
        for row in self._candidates(losses, index):
            off = np.flatnonzero((logits[row] > 0) != (targets[row] > 0))
            self._keep(
                losses[row], index[row],
                true=self._named(np.flatnonzero(targets[row] > 0)),
                predicted=self._named(np.flatnonzero(logits[row] > 0)),
                score=float(np.abs(scores[row] - targets[row]).max()), wrong=bool(off.size),
            )  # fmt: skip

    def _values(self, logits: NDArray[Any], targets: NDArray[Any], index: NDArray[Any]) -> None:
        values = logits.reshape(len(index), -1)
        true = np.asarray(targets, np.float64).reshape(values.shape)
        errors = np.abs(values - true).max(axis=1)
        for row in self._candidates(errors, index):
            place = int(np.abs(values[row] - true[row]).argmax())
            self._keep(
                errors[row], index[row],
                true=float(true[row, place]), predicted=float(values[row, place]),
                wrong=bool(errors[row] > 0), **({"output": place} if values.shape[1] > 1 else {}),
            )  # fmt: skip
        # The samples whose numbers have the smallest hash: an even part of them, in whatever order they come.
        for row in range(len(index)):
            number = int(index[row])
            entry = (-_scatter(number), number, (float(true[row, 0]), float(values[row, 0])))
            if len(self._points) < self.points:
                heapq.heappush(self._points, entry)
            elif entry > self._points[0]:
                heapq.heapreplace(self._points, entry)

    def _candidates(self, losses: NDArray[Any], index: NDArray[Any]) -> list[int]:
        """Rows of a batch that may be among the worst."""
        order = np.lexsort((index, -losses))[: self.worst].tolist()
        if len(self._worst) < self.worst:
            return order
        return [row for row in order if (float(losses[row]), -int(index[row])) > self._worst[0][:2]]

    def _keep(self, loss: float, index: int, **facts: Any) -> None:
        # Ties go to the sample with the smaller number, so that the order of batches changes nothing.
        entry = (float(loss), -int(index), {"index": int(index), "loss": float(loss), **facts})
        if len(self._worst) < self.worst:
            heapq.heappush(self._worst, entry)
        elif entry[:2] > self._worst[0][:2]:
            heapq.heapreplace(self._worst, entry)

    def _named(self, numbers: NDArray[Any]) -> str:
        more = f" and {len(numbers) - MAX_LABELS} more" if len(numbers) > MAX_LABELS else ""
        return (", ".join(self.names[number] for number in numbers[:MAX_LABELS]) or "none") + more


def _scatter(number: int) -> int:
    """A fixed 64-bit mix of a sample number: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    mask = (1 << 64) - 1
    value = (number + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
