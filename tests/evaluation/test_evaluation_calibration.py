"""Reliability bins and ECE against the definition written out, and against scikit-learn."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from pyft.errors import ConfigError, DataError
from pyft.evaluation.calibration import CalibrationCounter, calibration


def by_definition(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    """Guo et al. (2017), equation 3, bin by bin in exact fractions."""
    total = Fraction(0)
    for m in range(1, bins + 1):
        low, high = Fraction(m - 1, bins), Fraction(m, bins)
        inside = [
            (Fraction(float(p)), int(c))
            for p, c in zip(confidence, correct, strict=True)
            if low < Fraction(float(p)) <= high or (m == 1 and p == 0)
        ]
        if inside:
            accuracy = Fraction(sum(c for _, c in inside), len(inside))
            mean = sum((p for p, _ in inside), Fraction(0)) / len(inside)
            total += Fraction(len(inside), len(confidence)) * abs(accuracy - mean)
    return float(total)


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_ece_is_that_of_the_paper(bins: int, size: int) -> None:
    generator = np.random.default_rng(size)
    confidence = generator.random(size)
    correct = generator.random(size) < confidence**2
    assert calibration(confidence, correct, bins).ece == pytest.approx(
        by_definition(confidence, correct, bins), abs=1e-12
    )


def test_bins_are_those_of_scikit_learn() -> None:
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    generator = np.random.default_rng(0)
    confidence = generator.random(500) ** 2
    correct = generator.random(500) < 0.3
    found = calibration(confidence, correct)
    true, mean = curve(correct, confidence, n_bins=15)
    met = found.count > 0
    np.testing.assert_allclose(found.accuracy[met], true, rtol=1e-12)
    np.testing.assert_allclose(found.confidence[met], mean, rtol=1e-12)


def test_a_probability_on_an_edge_belongs_to_the_lower_bin() -> None:
    assert calibration([0.5, 0.5, 0.25], [1, 0, 1], bins=2).count.tolist() == [3, 0]
    assert calibration([0.0, 1.0], [0, 1], bins=2).count.tolist() == [1, 1]
    assert calibration([1.0 + 1e-7], [1], bins=2).count.tolist() == [0, 1]


def test_perfect_and_hopeless() -> None:
    assert calibration([1.0, 1.0], [1, 1]).ece == 0.0
    assert calibration([1.0, 1.0], [0, 0]).ece == 1.0
    assert calibration([0.75] * 4, [1, 1, 1, 0]).ece == 0.0
    assert calibration([0.1, 0.9, 0.9], [0, 1, 0], bins=2).mce == pytest.approx(0.4)


def test_batches_and_groups_add_up() -> None:
    generator = np.random.default_rng(1)
    confidence, correct = generator.random((90, 3)), generator.random((90, 3)) < 0.5
    counter = CalibrationCounter(groups=3)
    for start in range(0, 90, 40):
        for group in range(3):
            counter.update(confidence[start : start + 40, group], correct[start : start + 40, group], group)
    whole = counter.calibration()
    assert whole.ece == pytest.approx(by_definition(confidence.ravel(), correct.ravel(), 15), abs=1e-12)
    for group in range(3):
        alone = by_definition(confidence[:, group], correct[:, group], 15)
        assert counter.calibration(group).ece == pytest.approx(alone, abs=1e-12)
    kept = whole.to_dict()
    assert sum(kept["count"]) == 270
    assert [value is None for value in kept["accuracy"]] == [count == 0 for count in kept["count"]]


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "nothing was counted"),
        ([0.5, 0.6], [1], r"\(2,\) and \(1,\)"),
        ([[0.5]], [[1]], r"must both be \(N,\)"),
        ([0.5, float("nan")], [1, 1], "got nan in row 1"),
        ([1.5], [1], "got 1.5 in row 0"),
        ([-0.1], [1], "in row 0"),
        ([0.5], [2], "expected bool, or 0 and 1"),
    ],
)
def test_what_is_no_probability_is_refused(confidence: list, correct: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibration(confidence, correct)


@pytest.mark.parametrize("bins", [0, -1, 2.0, True])
def test_bins_are_a_whole_number(bins: object) -> None:
    with pytest.raises(ConfigError, match="bins"):
        calibration([0.5], [1], bins)  # type: ignore[arg-type]
