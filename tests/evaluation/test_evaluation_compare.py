"""Comparison of two models: against scipy, statsmodels, scikit-learn, and formulas by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, mean_absolute_error, r2_score, root_mean_squared_error

from pyft.errors import ConfigError, DataError
from pyft.evaluation import compare as compare_module
from pyft.evaluation.compare import compare_predictions, mcnemar
from pyft.evaluation.metrics import classification_metrics, multilabel_metrics, regression_metrics

CLASSES = ["ant", "bee", "cat"]


def answers(count: int = 400, size: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, size, count)
    a = np.where(generator.random(count) < 0.8, targets, generator.integers(0, size, count))
    b = np.where(generator.random(count) < 0.15, generator.integers(0, size, count), a)
    return targets, a, b


def values(count: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.standard_normal(count) * 10 + 1e4
    return targets, targets + generator.standard_normal(count) * 2, targets + generator.standard_normal(count) * 3


def _accuracy(targets: np.ndarray, found: np.ndarray) -> float:
    return float((targets == found).mean())


def _macro_f1(targets: np.ndarray, found: np.ndarray) -> float:
    """As scikit-learn's, which takes a millisecond a call."""
    right = np.bincount(targets[targets == found], minlength=3)
    return float((2 * right / (np.bincount(targets, minlength=3) + np.bincount(found, minlength=3))).mean())


def _rmse(targets: np.ndarray, found: np.ndarray) -> float:
    return float(np.sqrt(((targets - found) ** 2).mean()))


def _mae(targets: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(targets - found).mean())


def _r2(targets: np.ndarray, found: np.ndarray) -> float:
    return float(1 - ((targets - found) ** 2).sum() / ((targets - targets.mean()) ** 2).sum())


class TestMcNemar:
    @pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (12, 7), (3, 30), (600, 400), (1, 999)])
    def test_exact_is_the_binomial_test(self, only_a: int, only_b: int) -> None:
        statsmodels = pytest.importorskip("statsmodels.stats.contingency_tables")
        found = mcnemar(*_rights(10, only_a, only_b, 4))
        assert (found.both, found.only_a, found.only_b, found.neither, found.method) == (10, only_a, only_b, 4, "exact")
        expected = statsmodels.mcnemar([[10, only_a], [only_b, 4]], exact=True).pvalue if only_a + only_b else 1.0
        assert found.p_value == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize(("only_a", "only_b"), [(501, 500), (600, 700), (1500, 1100)])
    def test_many_are_the_corrected_chi_square(self, only_a: int, only_b: int) -> None:
        statsmodels = pytest.importorskip("statsmodels.stats.contingency_tables")
        found = mcnemar(*_rights(3, only_a, only_b, 2))
        expected = statsmodels.mcnemar([[3, only_a], [only_b, 2]], exact=False, correction=True).pvalue
        assert found.method == "chi-square"
        assert found.p_value == pytest.approx(expected, rel=1e-9)

    def test_as_many_on_both_sides_is_no_difference(self) -> None:
        assert mcnemar(*_rights(0, 600, 600, 0)).p_value == pytest.approx(1.0)


def _rights(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


class TestIntervals:
    @pytest.mark.parametrize("confidence", [0.95, 0.5])
    def test_those_of_scipy_for_classes(self, confidence: float) -> None:
        stats = pytest.importorskip("scipy.stats")
        targets, a, b = answers()
        found = compare_predictions(targets, a, b, "classification", 3, resamples=20_000, confidence=confidence)
        metrics: dict[str, Any] = {"accuracy": _accuracy, "macro_f1": _macro_f1}
        assert _macro_f1(targets, a) == pytest.approx(f1_score(targets, a, average="macro"))
        for name, metric in metrics.items():
            expected = stats.bootstrap(
                (np.arange(400),), lambda i, metric=metric: metric(targets[i], b[i]) - metric(targets[i], a[i]),
                vectorized=False, method="percentile", n_resamples=2000, confidence_level=confidence,
                rng=np.random.default_rng(1),
            )  # fmt: skip
            one = found[name]
            assert one.difference == pytest.approx(metric(targets, b) - metric(targets, a), abs=1e-12)
            # A quantile of 2,000 draws is known to a tenth of the deviation or so, and accuracies are 1/400 apart.
            near = 0.15 * expected.standard_error + 1 / 400
            assert one.low == pytest.approx(expected.confidence_interval.low, abs=near)
            assert one.high == pytest.approx(expected.confidence_interval.high, abs=near)

    def test_those_of_scipy_for_values(self) -> None:
        stats = pytest.importorskip("scipy.stats")
        targets, a, b = values()
        found = compare_predictions(targets, a, b, "regression", resamples=20_000)
        metrics: dict[str, Any] = {"rmse": _rmse, "mae": _mae, "r2": _r2}
        for mine, theirs in ((_rmse, root_mean_squared_error), (_mae, mean_absolute_error), (_r2, r2_score)):
            assert mine(targets, a) == pytest.approx(theirs(targets, a))
        for name, metric in metrics.items():
            expected = stats.bootstrap(
                (np.arange(300),), lambda i, metric=metric: metric(targets[i], b[i]) - metric(targets[i], a[i]),
                vectorized=False, method="percentile", n_resamples=2000, rng=np.random.default_rng(1),
            )  # fmt: skip
            one = found[name]
            assert one.a == pytest.approx(metric(targets, a), rel=1e-9)
            assert one.difference == pytest.approx(metric(targets, b) - metric(targets, a), rel=1e-9)
            assert one.low == pytest.approx(expected.confidence_interval.low, abs=0.15 * expected.standard_error)
            assert one.high == pytest.approx(expected.confidence_interval.high, abs=0.15 * expected.standard_error)

    def test_accuracy_by_hand(self) -> None:
        """The difference of accuracies has the variance (b + c - (b - c)^2 / n) / n^2; here the interval is normal."""
        targets, a, b = answers(5000)
        only_a, only_b = int(((a == targets) & (b != targets)).sum()), int(((a != targets) & (b == targets)).sum())
        spread = math.sqrt(only_a + only_b - (only_b - only_a) ** 2 / 5000) / 5000
        found = compare_predictions(targets, a, b, "classification", 3, resamples=50_000)["accuracy"]
        assert found.high - found.low == pytest.approx(2 * 1.959964 * spread, rel=0.02)
        assert found.significant

    def test_a_seed_gives_the_same_and_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = compare_predictions(*answers(), "classification", 3, resamples=300).to_dict()
        assert compare_predictions(*answers(), "classification", 3, resamples=300).to_dict() == first
        assert compare_predictions(*answers(), "classification", 3, resamples=300, seed=1).to_dict() != first
        monkeypatch.setattr(compare_module, "CHUNK", 100)
        assert compare_predictions(*answers(), "classification", 3, resamples=300).to_dict() == first

    def test_a_model_against_itself(self) -> None:
        targets, a, _ = answers()
        found = compare_predictions(targets, a, a, "classification", 3, resamples=100)
        for one in found.differences:
            assert (one.difference, one.low, one.high, one.significant) == (0, 0, 0, False)
        assert found.mcnemar is not None
        assert found.mcnemar.p_value == 1.0
        assert (found.num_disagreeing, found.disagreeing) == (0, [])


class TestMetrics:
    def test_every_metric_is_that_of_an_evaluation(self) -> None:
        targets, a, b = answers(seed=3)
        expected = classification_metrics(targets, b, 4)
        found = compare_predictions(targets, a, b, "classification", 4, metric=list(expected.values), resamples=5)
        assert {one.metric: one.b for one in found.differences} == pytest.approx(expected.values, abs=1e-12)

    def test_multilabel(self) -> None:
        generator = np.random.default_rng(0)
        targets, a, b = (generator.random((3, 60, 4)) > 0.4).astype(int)
        expected = multilabel_metrics(targets, b, 4)
        found = compare_predictions(targets, a, b, "multilabel", 4, metric=list(expected.values), resamples=5)
        assert {one.metric: one.b for one in found.differences} == pytest.approx(expected.values, abs=1e-12)
        right = (targets == a).all(1), (targets == b).all(1)
        assert found.mcnemar == mcnemar(*right)
        assert found.num_disagreeing == int((a != b).any(1).sum())
        row = found.disagreeing[0]
        assert row["a"] == [str(number) for number in np.flatnonzero(a[row["row"]])]

    def test_several_targets(self) -> None:
        generator = np.random.default_rng(0)
        targets, a, b = generator.standard_normal((3, 50, 2))
        found = compare_predictions(targets, a, b, "regression", resamples=10)
        expected = regression_metrics(targets, a)
        assert {one.metric: one.a for one in found.differences} == pytest.approx(
            {name: expected[name] for name in ("rmse", "mae", "r2")}, rel=1e-9
        )
        assert found.mcnemar is None
        assert found.disagreeing[0]["row"] == int(np.abs(a - b).max(1).argmax())

    def test_constant_targets(self) -> None:
        ones = np.ones(5)
        found = compare_predictions(ones, ones, ones * 2, "regression", resamples=10)
        assert (found["r2"].a, found["r2"].b) == (1.0, 0.0)


class TestResult:
    def test_one_sample(self) -> None:
        found = compare_predictions(np.array([1]), np.array([1]), np.array([0]), "classification", CLASSES)
        assert found["accuracy"].difference == -1
        assert found.disagreeing == [{"row": 0, "true": "bee", "a": "bee", "b": "ant"}]
        single = compare_predictions(np.array([1.0]), np.array([1.5]), np.array([2.0]), "regression")
        assert math.isnan(single["r2"].a)
        assert single.to_dict()["differences"][2]["a"] is None

    def test_text_and_json(self) -> None:
        targets, a, b = answers()
        found = compare_predictions(targets, a, b, "classification", CLASSES, names=("one.onnx", "two.onnx"))
        text = str(found)
        assert "b: two.onnx" in text
        assert "McNemar's test (exact)" in text
        assert "predicted differently" in text
        assert max(map(len, text.splitlines())) <= 80
        plain = json.loads(json.dumps(found.to_dict()))
        assert plain["mcnemar"]["only_a"] == int(((a == targets) & (b != targets)).sum())
        assert [row["row"] for row in plain["disagreeing"]] == np.flatnonzero(a != b)[:10].tolist()

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"metric": "auc"}, ConfigError, "metric='auc': expected 'auto' or one of accuracy, macro_f1"),
            ({"metric": "loss"}, ConfigError, "needs all logits"),
            ({"metric": []}, ConfigError, "metric="),
            ({"resamples": 0}, ConfigError, "resamples=0"),
            ({"resamples": 2.5}, ConfigError, "resamples=2.5"),
            ({"confidence": 95}, ConfigError, "confidence=95: expected a number between 0 and 1"),
            ({"problem": "ranking"}, ConfigError, "problem must be"),
            ({"classes": 2}, DataError, r"expected \(N,\) class index 0..1"),
            ({"targets": np.array([], int), "a": np.array([], int), "b": np.array([], int)}, DataError, "no sample"),
            ({"b": np.array([0])}, DataError, "one size"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], error: type[Exception], match: str) -> None:
        targets, a, b = answers()
        given = {"targets": targets, "a": a, "b": b, "problem": "classification", "classes": 3, **change}
        with pytest.raises(error, match=match):
            compare_predictions(**given)

    def test_values_that_are_not_finite(self) -> None:
        with pytest.raises(DataError, match="b: 1 rows are not finite"):
            compare_predictions(np.ones(2), np.ones(2), np.array([1, np.nan]), "regression")
