"""Whether probabilities mean what they say: reliability bins and the expected calibration error. NumPy alone.

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks" (2017): the confidences are put into M bins of
equal width ((m-1)/M, m/M]; ECE is the mean distance of a bin's accuracy from its mean confidence, weighted by how many
samples are in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.errors import ConfigError, DataError

BINS = 15


@dataclass(frozen=True, eq=False)
class Calibration:
    """The reliability of probabilities.

    Attributes:
        count: (M,) int64, how many are in each bin.
        confidence: (M,) mean probability in each bin, NaN in an empty one.
        accuracy: (M,) share in each bin that came true, NaN in an empty one.
    """

    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        return float(np.nansum(self.gaps * self.count) / self.count.sum())

    @property
    def mce(self) -> float:
        """The largest gap of a bin that is not empty, in [0, 1]."""
        return float(np.nanmax(self.gaps))

    @property
    def gaps(self) -> NDArray[np.float64]:
        """(M,) distance of accuracy and mean confidence, NaN in an empty bin."""
        return np.abs(self.accuracy - self.confidence)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; what an empty bin does not have is None."""
        return {
            "ece": self.ece,
            "mce": self.mce,
            "count": self.count.tolist(),
            "confidence": [None if np.isnan(value) else float(value) for value in self.confidence],
            "accuracy": [None if np.isnan(value) else float(value) for value in self.accuracy],
        }


def calibration(confidence: Any, correct: Any, bins: int = BINS) -> Calibration:
    """Reliability bins of N probabilities.

    Args:
        confidence: (N,) probability of what was predicted, in [0, 1].
        correct: (N,) whether it came true, bool or 0 and 1.
        bins: M.

    Raises:
        DataError: nothing given, sizes that differ, a probability outside [0, 1] or NaN.
        ConfigError: no bins.

    >>> found = calibration([0.9, 0.9, 0.6], [True, False, True], bins=2)
    >>> round(found.ece, 4)  # one bin: 2/3 correct, mean confidence 0.8
    0.1333
    """
    counter = CalibrationCounter(bins)
    counter.update(confidence, correct)
    return counter.calibration()


class CalibrationCounter:
    """Running sums for `calibration`; memory is that of the bins, whatever the number of samples.

    Args:
        bins: M, per group.
        groups: G; samples of several groups (the labels of a multilabel problem) are kept apart.

    Raises:
        ConfigError: no bins or no groups.
    """

    def __init__(self, bins: int = BINS, groups: int = 1) -> None:
        for name, value in (("bins", bins), ("groups", groups)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ConfigError(f"{name}={value!r}: expected a whole number of 1 or more")
        self.edges = np.arange(1, bins + 1) / bins
        self.count = np.zeros((groups, bins), np.int64)
        self.confidence = np.zeros((groups, bins))
        self.correct = np.zeros((groups, bins), np.int64)

    def update(self, confidence: Any, correct: Any, group: int = 0) -> None:
        """Count one batch: (B,) probabilities and (B,) whether they came true.

        Raises:
            DataError: sizes that differ, a probability outside [0, 1] or NaN, `correct` other than 0 and 1.
        """
        values, true = np.asarray(confidence, np.float64), np.asarray(correct)
        if values.ndim != 1 or true.shape != values.shape:
            raise DataError(f"confidence and correct must both be (N,), got {values.shape} and {true.shape}")
        # Rounding may take a softmax past 1 by a unit in the last place of float32.
        wrong = np.flatnonzero(~((values >= 0) & (values <= 1 + 1e-6)))
        if wrong.size:
            raise DataError(f"confidence: expected numbers in [0, 1], got {values[wrong[0]]} in row {wrong[0]}")
        if not np.isin(true, (0, 1)).all():
            raise DataError("correct: expected bool, or 0 and 1")
        values = np.minimum(values, 1.0)
        place = np.minimum(np.searchsorted(self.edges, values, side="left"), len(self.edges) - 1)
        size = len(self.edges)
        self.count[group] += np.bincount(place, minlength=size)
        self.confidence[group] += np.bincount(place, weights=values, minlength=size)
        self.correct[group] += np.bincount(place[true.astype(bool)], minlength=size)

    def calibration(self, group: int | None = None) -> Calibration:
        """The reliability of one group, or of all together.

        Raises:
            DataError: nothing was counted.
        """
        which = slice(None) if group is None else slice(group, group + 1)
        count = self.count[which].sum(axis=0)
        if not count.sum():
            raise DataError("calibration: nothing was counted; give at least one sample")
        with np.errstate(invalid="ignore", divide="ignore"):
            return Calibration(
                count, self.confidence[which].sum(axis=0) / count, self.correct[which].sum(axis=0) / count
            )
