"""Scores and streaming prediction against torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from pyft.errors import ConfigError, DataError
from pyft.evaluation.predict import evaluate_batches, predict_logits
from pyft.evaluation.scores import predictions_from_logits, scores_from_logits, sigmoid, softmax, to_numpy
from pyft.samples import Batch


def batches(x, y, size=4):
    for start in range(0, len(x), size):
        stop = min(start + size, len(x))
        yield Batch(x[start:stop], None if y is None else y[start:stop], torch.arange(start, stop))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_softmax_and_sigmoid_agree_with_torch(scale):
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    np.testing.assert_allclose(softmax(logits.numpy()), logits.softmax(-1).numpy(), rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(sigmoid(logits.numpy()), logits.sigmoid().numpy(), rtol=1e-13, atol=1e-300)


def test_scores_and_predictions_by_problem():
    logits = np.array([[2.0, -1.0], [-3.0, 0.5]], np.float32)
    assert scores_from_logits(logits, "classification").sum(1) == pytest.approx([1, 1])
    assert scores_from_logits(logits, "regression") is logits
    assert predictions_from_logits(logits, "classification").tolist() == [0, 1]
    assert predictions_from_logits(logits, "multilabel").tolist() == [[1, 0], [0, 1]]
    assert predictions_from_logits(logits, "regression") is logits
    with pytest.raises(ConfigError, match="got 'ranking'"):
        predictions_from_logits(logits, "ranking")


def test_to_numpy_widens_half_precision():
    assert to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]


def test_predict_logits_streams_without_autograd():
    model = torch.nn.Linear(3, 2)
    x = torch.randn(10, 3)
    taken = []

    def watched():
        for batch in batches(x, None):
            taken.append(len(batch.index))
            yield batch

    stream = predict_logits(model, watched())
    first = next(stream)
    assert taken == [4]
    assert torch.is_grad_enabled()
    assert first.targets is None
    rest = [first, *stream]
    assert taken == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([p.logits for p in rest]), model(x).detach().numpy())
    np.testing.assert_array_equal(np.concatenate([p.index for p in rest]), np.arange(10))


def test_evaluate_batches_counts_every_sample():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 3, generator=generator)
    y = torch.randint(0, 3, (11,), generator=generator)
    metrics = evaluate_batches(lambda x: x, batches(x, y), "classification", ["a", "b", "c"])
    assert metrics.num_samples == 11
    assert metrics["accuracy"] == pytest.approx((x.argmax(1) == y).double().mean().item(), rel=1e-12)
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(x.double(), y).item(), rel=1e-12)


def test_regression_and_multilabel_batches():
    x = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    assert evaluate_batches(lambda x: x, batches(x, (x > 0).float()), "multilabel", ["a", "b"])["exact_match"] == 1
    assert evaluate_batches(lambda x: x[:, :1], batches(x, x[:, 0]), "regression")["rmse"] == 0


def test_what_cannot_be_evaluated_is_said():
    x = torch.randn(4, 3)
    with pytest.raises(DataError, match="no labels"):
        evaluate_batches(lambda x: x, batches(x, None), "classification", 3)
    with pytest.raises(DataError, match="no sample"):
        evaluate_batches(lambda x: x, [], "classification", 3)
    with pytest.raises(ConfigError, match=r"4 samples, got \(3,\)"):
        list(predict_logits(lambda x: x.sum(0), batches(x, None)))
    with pytest.raises(ConfigError, match="got tuple"):
        list(predict_logits(lambda x: (x,), batches(x, None)))


def test_metrics_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pyft.evaluation.metrics import classification_metrics\n"
        "import pyft.evaluation.predict\n"
        "assert classification_metrics([0, 1], [[1.0, 0.0], [0.0, 1.0]], 2)['accuracy'] == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
