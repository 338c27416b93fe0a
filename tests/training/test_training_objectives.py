"""Losses against formulas in float64, torch and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyft.errors import ConfigError
from pyft.training.objectives import class_weights, make_loss


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_the_weighted_mean(smoothing: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 4, generator=generator)
    targets = torch.randint(0, 4, (11,), generator=generator)
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0]) if weighted else None
    objective = make_loss("classification", "cross_entropy", weight, smoothing)
    w = weight.double().numpy() if weight is not None else np.ones(4)
    wanted = np.full((11, 4), smoothing / 4)
    wanted[np.arange(11), targets.numpy()] += 1 - smoothing
    terms = -(wanted * w * log_softmax(logits.double().numpy())).sum(1)
    divisor = w[targets.numpy()].sum()
    assert float(objective(logits, targets)) == pytest.approx(terms.sum() / divisor, rel=2e-6)
    assert objective.denominator(targets) == pytest.approx(divisor, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bce_of_multilabel_weighs_the_positives(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, generator=generator)
    targets = torch.randint(0, 2, (5, 3), generator=generator).float()
    weight = torch.tensor([1.0, 4.0, 0.5])
    z, t, w = logits.double().numpy(), targets.double().numpy(), weight.double().numpy()
    t = t * (1 - smoothing) + smoothing / 2
    wanted = (w * t * np.log1p(np.exp(-z)) + (1 - t) * np.log1p(np.exp(z))).mean()
    objective = make_loss("multilabel", "auto", weight, smoothing)
    assert float(objective(logits, targets)) == pytest.approx(wanted, rel=2e-6)
    assert objective.denominator(targets) == 5.0


def test_bce_of_classification_is_one_against_all() -> None:
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    wanted = F.binary_cross_entropy_with_logits(logits, F.one_hot(targets, 3).float())
    assert torch.equal(make_loss("classification", "bce")(logits, targets), wanted)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("mse", lambda d: d**2),
        ("l1", abs),
        ("huber", lambda d: np.where(abs(d) < 1, 0.5 * d**2, abs(d) - 0.5)),
    ],
)
def test_regression_losses(name: str, formula: Any) -> None:
    outputs, targets = torch.tensor([[0.0], [3.0], [-1.0]]), torch.tensor([0.5, 1.0, -1.25])
    difference = outputs.double().numpy()[:, 0] - targets.double().numpy()
    assert float(make_loss("regression", name)(outputs, targets)) == pytest.approx(formula(difference).mean(), rel=1e-6)


@pytest.mark.parametrize(("outputs", "targets"), [((4, 1), (4,)), ((4,), (4, 1)), ((4,), (4,)), ((4, 1), (4, 1))])
def test_regression_never_broadcasts(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    # Equal values: any broadcast to (4, 4) would give a loss above 0.
    assert float(make_loss("regression")(values.reshape(outputs), values.reshape(targets))) == 0.0


@pytest.mark.parametrize(
    ("problem", "outputs", "targets"),
    [
        ("regression", (4, 2), (4,)),
        ("regression", (4,), (3,)),
        ("regression", (1, 4), (4,)),
        ("regression", (4, 3), (4, 1)),
        ("classification", (4,), (4,)),
        ("classification", (4, 3), (4, 3)),
        ("classification", (5, 3), (4,)),
        ("multilabel", (4, 3), (4,)),
        ("multilabel", (4, 3), (4, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_named(problem: Any, outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    dtype = torch.int64 if problem == "classification" else torch.float32
    with pytest.raises(ConfigError) as caught:
        make_loss(problem)(torch.zeros(outputs), torch.zeros(targets, dtype=dtype))
    assert str(outputs) in str(caught.value)
    assert str(targets) in str(caught.value)


def test_half_logits_are_widened_before_the_loss() -> None:
    logits, targets = torch.tensor([[3.0, -2.0, 0.5]], dtype=torch.bfloat16), torch.tensor([0])
    loss = make_loss("classification")(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits.float(), targets))


def test_a_loss_of_ones_own() -> None:
    def twice(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 2 * F.cross_entropy(logits, targets)

    logits, targets = torch.randn(3, 2), torch.tensor([0, 1, 1])
    assert torch.equal(make_loss("classification", twice)(logits, targets), twice(logits, targets))
    with pytest.raises(ConfigError, match=r"scalar.*\(3,\)"):
        make_loss("classification", lambda a, b: F.cross_entropy(a, b, reduction="none"))(logits, targets)


def test_the_weights_of_a_torch_loss_count_in_the_denominator() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    assert make_loss("classification", loss).denominator(torch.tensor([0, 1, 1])) == 7.0


def test_balanced_agrees_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    targets = torch.tensor([0] * 7 + [1] * 2 + [2])
    wanted = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
    weights = class_weights("balanced", targets, "classification", 3)
    assert weights is not None
    np.testing.assert_allclose(weights.numpy(), wanted, rtol=1e-6)
    # A class without samples has no finite balanced weight.
    extended = class_weights("balanced", targets, "classification", 4)
    assert extended is not None
    assert extended[3] == 0.0
    np.testing.assert_allclose(extended[:3].numpy(), wanted * 3 / 4, rtol=1e-6)


def test_balanced_multilabel_is_negatives_by_positives() -> None:
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    weights = class_weights("balanced", targets, "multilabel", 2)
    assert weights is not None
    assert weights.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("spec", [[1.0], [1.0, -1.0], [1.0, float("nan")], [0.0, 0.0], "even"])
def test_bad_class_weights(spec: Any) -> None:
    with pytest.raises(ConfigError, match="class_weight"):
        class_weights(spec, torch.tensor([0, 1]), "classification", 2)


def test_parts_that_do_not_fit_together() -> None:
    with pytest.raises(ConfigError, match="class_weight does not apply to regression"):
        class_weights("balanced", torch.tensor([0.5]), "regression", 1)
    with pytest.raises(ConfigError, match="label_smoothing does not apply to regression"):
        make_loss("regression", "mse", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="does not fit regression"):
        make_loss("regression", "cross_entropy")
    with pytest.raises(ConfigError, match="loss of your own"):
        make_loss("classification", nn.CrossEntropyLoss(), torch.ones(2))
    with pytest.raises(ConfigError, match="problem must be"):
        make_loss("ranking")  # type: ignore[arg-type]
