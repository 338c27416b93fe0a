"""Metrics against scikit-learn."""

from __future__ import annotations

import json
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from pyft.errors import ConfigError, DataError
from pyft.evaluation.metrics import (
    ConfusionCounter,
    MultilabelCounter,
    RegressionCounter,
    classification_metrics,
    make_counter,
    multilabel_metrics,
    regression_metrics,
)

reference = pytest.importorskip("sklearn.metrics")

EXACT = {"rel": 1e-12, "abs": 1e-12}
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def labelled(draw, max_classes=8):
    """Targets and predictions over C classes, of which many may be absent."""
    size = draw(st.integers(1, max_classes))
    rows = draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), min_size=1, max_size=40))
    targets, predicted = np.array(rows).T
    return size, targets, predicted


def sklearn_values(targets, predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = {"average": "macro", "zero_division": 0}
        return {
            "accuracy": reference.accuracy_score(targets, predicted),
            "macro_f1": reference.f1_score(targets, predicted, **kind),
            "macro_precision": reference.precision_score(targets, predicted, **kind),
            "macro_recall": reference.recall_score(targets, predicted, **kind),
            "weighted_f1": reference.f1_score(targets, predicted, average="weighted", zero_division=0),
            "balanced_accuracy": reference.balanced_accuracy_score(targets, predicted),
        }


def check_classification(size, targets, predicted):
    metrics = classification_metrics(targets, predicted, size)
    assert metrics.values == pytest.approx(sklearn_values(targets, predicted), **EXACT)
    labels = range(size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        confusion = reference.confusion_matrix(targets, predicted, labels=labels)
    assert metrics.confusion.dtype == np.int64
    np.testing.assert_array_equal(metrics.confusion, confusion)
    columns = reference.precision_recall_fscore_support(targets, predicted, labels=labels, zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [row[name] for row in metrics.per_class] == pytest.approx(column.tolist(), **EXACT)


@QUICK
@given(labelled())
def test_classification_agrees_with_scikit_learn(case):
    check_classification(*case)


def test_classification_77_classes():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 77, 3080)
    predicted = np.where(rng.random(3080) < 0.9, targets, rng.integers(0, 77, 3080))
    check_classification(77, targets, predicted)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_single_class_present(size):
    check_classification(size, np.zeros(6, int), np.zeros(6, int))


def test_nothing_right():
    check_classification(3, np.array([0, 1, 0]), np.array([2, 2, 2]))


@QUICK
@given(st.integers(2, 9), st.integers(1, 30), st.floats(0.01, 200), st.integers(0, 10**6))
def test_log_loss_agrees_with_scikit_learn(size, rows, scale, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, size)) * scale
    targets = rng.integers(0, size, rows)
    metrics = classification_metrics(targets, logits, size)
    ours = metrics["loss"]
    exact = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets)).item()
    assert ours == pytest.approx(exact, **EXACT)
    assert metrics["accuracy"] == (logits.argmax(1) == targets).mean()
    # scikit-learn clips probabilities, so only where no clipping happens.
    if scale < 2:
        probabilities = torch.from_numpy(logits).softmax(1).numpy()
        assert ours == pytest.approx(reference.log_loss(targets, probabilities, labels=range(size)), **EXACT)


def test_log_loss_of_huge_logits_is_exact():
    logits = np.array([[1e6, 0.0], [0.0, 1e6]], np.float32)
    assert classification_metrics([0, 0], logits, 2)["loss"] == 5e5


@QUICK
@given(labelled(), st.integers(1, 7))
def test_streaming_equals_one_batch(case, step):
    size, targets, predicted = case
    logits = np.random.default_rng(len(targets)).normal(size=(len(targets), size)) + 5 * np.eye(size)[predicted]
    counter = ConfusionCounter(size)
    for start in range(0, len(targets), step):
        counter.update(targets[start : start + step], torch.from_numpy(logits[start : start + step]))
    whole, parts = classification_metrics(targets, logits, size), counter.metrics()
    np.testing.assert_array_equal(whole.confusion, parts.confusion)
    assert whole.values == pytest.approx(parts.values, **EXACT)


def test_more_classes_than_a_matrix_may_have(monkeypatch):
    monkeypatch.setattr("pyft.evaluation.metrics.MAX_CONFUSION_CLASSES", 3)
    targets, predicted = np.array([0, 1, 2, 3, 3]), np.array([0, 1, 1, 3, 0])
    metrics = classification_metrics(targets, predicted, 4)
    assert metrics.confusion is None
    assert metrics.values == pytest.approx(sklearn_values(targets, predicted), **EXACT)
    assert metrics.most_confused() == []
    assert metrics.to_dict()["confusion"] is None


@QUICK
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 10**6))
def test_multilabel_agrees_with_scikit_learn(size, rows, seed):
    rng = np.random.default_rng(seed)
    targets = (rng.random((rows, size)) < rng.choice([0.0, 0.3, 0.9], size)).astype(np.float32)
    logits = rng.normal(size=(rows, size)) * 3
    predicted = (logits > 0).astype(int)
    metrics = multilabel_metrics(targets, logits, size)
    expected = {"exact_match": (targets == predicted).all(1).mean()}
    true = targets.astype(int)
    for average in ("micro", "macro"):
        for name in ("f1", "precision", "recall"):
            score = getattr(reference, f"{name}_score")
            if size > 1:
                expected[f"{average}_{name}"] = score(true, predicted, average=average, zero_division=0)
            else:
                expected[f"{average}_{name}"] = score(true[:, 0], predicted[:, 0], zero_division=0)
    wide = torch.from_numpy(targets).double()
    expected["loss"] = torch.nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), wide).item()
    assert metrics.values == pytest.approx(expected, **EXACT)
    if size > 1:
        assert metrics["exact_match"] == reference.accuracy_score(true, predicted)
        np.testing.assert_array_equal(metrics.confusion, reference.multilabel_confusion_matrix(true, predicted))
    counter = MultilabelCounter(size)
    for row in range(rows):
        counter.update(targets[row : row + 1], logits[row : row + 1])
    assert counter.metrics().values == pytest.approx(metrics.values, **EXACT)


@QUICK
@given(st.integers(2, 30), st.integers(1, 3), st.integers(0, 10**6), st.integers(1, 9))
def test_regression_agrees_with_scikit_learn(rows, outputs, seed, step):
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=(rows, outputs)).round(2) * 10
    predicted = targets + rng.normal(size=(rows, outputs)) * rng.choice([0.0, 0.5, 5.0])
    targets[:, 0] = 3.0 if seed % 4 == 0 else targets[:, 0]
    counter = RegressionCounter()
    for start in range(0, rows, step):
        counter.update(targets[start : start + step], predicted[start : start + step])
    expected = {
        "rmse": reference.root_mean_squared_error(targets, predicted),
        "mae": reference.mean_absolute_error(targets, predicted),
        "r2": reference.r2_score(targets, predicted),
        "loss": reference.mean_squared_error(targets, predicted),
    }
    assert counter.metrics().values == pytest.approx(expected, **EXACT)
    assert regression_metrics(targets, predicted).values == pytest.approx(expected, **EXACT)


def test_regression_keeps_digits_beside_a_large_mean():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1000)
    targets, predicted = 1e8 + noise, 1e8 + noise + 0.5 * rng.normal(size=1000)
    counter = RegressionCounter()
    for start in range(0, 1000, 7):
        counter.update(targets[start : start + 7], predicted[start : start + 7])
    assert counter.metrics()["r2"] == pytest.approx(reference.r2_score(targets, predicted), rel=1e-9)


def test_regression_constant_target_and_single_sample():
    assert regression_metrics([2.0, 2.0], [2.0, 2.0])["r2"] == 1.0
    assert regression_metrics([2.0, 2.0], [2.0, 3.0])["r2"] == 0.0
    one = regression_metrics([2.0], [3.0])
    assert one["mae"] == 1.0
    assert np.isnan(one["r2"])
    assert one.to_dict()["values"]["r2"] is None


def test_regression_takes_a_column_for_a_vector():
    assert regression_metrics([1.0, 2.0], [[1.0], [4.0]])["mae"] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification_metrics([], [], ["a", "b"]), "no sample"),
        (lambda: classification_metrics(np.zeros(0, int), np.zeros((0, 2)), ["a", "b"]), "no sample"),
        (lambda: multilabel_metrics(np.zeros((0, 2)), np.zeros((0, 2))), "no sample"),
        (lambda: regression_metrics([], []), "no sample"),
        (lambda: classification_metrics([0, 1], [0], ["a", "b"]), r"\(2,\) and \(1,\)"),
        (
            lambda: classification_metrics([0, 2], [0, 1], ["a", "b"]),
            "1 class index outside 0..1.* 2 in row 1",
        ),
        (lambda: classification_metrics([0, -1], [0, 1], ["a", "b"]), "first is -1"),
        (lambda: classification_metrics([0, 1], [0, 7], ["a", "b"]), "scores: 1 class index"),
        (lambda: classification_metrics([0.5, 1.0], [0, 1], ["a", "b"]), "integer, got float64"),
        (lambda: classification_metrics([0, 1], [[0, 1.0], [np.nan, 0]], 2), "1 of 2 rows .* row 1"),
        (lambda: classification_metrics([0], [[np.inf, 0.0]], 2), "not finite"),
        (lambda: multilabel_metrics([[0, 2]], [[0.0, 1.0]]), "0 or 1, got 2"),
        (lambda: multilabel_metrics([[0, 1]], [[0.0, 1.0, 2.0]]), "one column per class"),
        (lambda: regression_metrics([1.0, 2.0], [1.0]), r"one size, got \(2,\) and \(1,\)"),
        (lambda: regression_metrics([1.0, 2.0], [1.0, np.nan]), "predictions: 1 not finite, the first in row 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_masked_class_is_allowed():
    metrics = classification_metrics([0, 1], [[1.0, -np.inf], [-np.inf, 2.0]], 2)
    assert metrics["accuracy"] == 1
    assert metrics["loss"] == 0


def test_make_counter_refuses_what_it_cannot_count():
    with pytest.raises(ConfigError, match="'classification', 'multilabel' or 'regression', got 'ranking'"):
        make_counter("ranking")
    with pytest.raises(ConfigError, match="classes must be given"):
        make_counter("classification")
    with pytest.raises(ConfigError, match="at least one class"):
        make_counter("classification", [])


def test_unknown_value_lists_the_known():
    with pytest.raises(ConfigError, match="'f1'; there are: accuracy, macro_f1"):
        classification_metrics([0, 1], [0, 1], 2)["f1"]


@pytest.mark.parametrize("size", [2, 20, 77, 100])
def test_table_fits_80_columns(size):
    rng = np.random.default_rng(size)
    names = [f"a rather long intent name, number {i:03d} of many, with\nmore" for i in range(size)]
    names[0] = "宽" * 60
    targets = rng.integers(0, size, 4000)
    predicted = np.where(rng.random(4000) < 0.7, targets, rng.integers(0, size, 4000))
    predicted[targets == 1] = 0
    logits = rng.normal(size=(4000, size)) + 8 * np.eye(size)[predicted]
    text = str(classification_metrics(targets, logits, names))
    from rich.cells import cell_len

    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert len(text.splitlines()) <= 40
    assert "accuracy" in text
    assert "4,000 samples" in text
    assert "0.0000" in text  # class 1 is never right, so it is among the worst
    if size > 2:
        assert "most confused" in text


def test_table_of_many_classes_leaves_out_absent_ones_and_says_so():
    targets = np.arange(50)
    predicted = targets.copy()
    predicted[7] = 8
    text = str(classification_metrics(targets, predicted, 60))
    assert "40 more" in text
    assert "\n55 " not in text
    assert "\n7 " in text


def test_to_dict_is_json():
    for metrics in (
        classification_metrics([0, 1, 1], np.eye(2)[[0, 1, 0]], ["a", "b"]),
        multilabel_metrics([[0, 1]], [[-1.0, 2.0]], ["a", "b"]),
        regression_metrics([1.0], [2.0]),
    ):
        again = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
        assert again["num_samples"] == metrics.num_samples
        assert set(again["values"]) == set(metrics.values)
        assert isinstance(str(metrics), str)


def test_most_confused_names_the_pairs():
    metrics = classification_metrics([0, 0, 0, 1, 2], [1, 1, 0, 2, 2], ["a", "b", "c"])
    assert metrics.most_confused() == [("a", "b", 2), ("b", "c", 1)]
