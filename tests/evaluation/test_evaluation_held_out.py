"""What is kept of held-out scores: the same as if everything had been kept, whatever the batches."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional

from pyft.evaluation.held_out import HeldOut
from pyft.evaluation.predict import Predictions


def batches(logits: np.ndarray, targets: np.ndarray, size: int, seed: int) -> Iterator[Predictions]:
    order = np.random.default_rng(seed).permutation(len(logits))
    for start in range(0, len(order), size):
        index = order[start : start + size]
        yield Predictions(logits[index], targets[index], index)


def kept(problem: str, classes: int | None, logits: np.ndarray, targets: np.ndarray, size: int, **limits: int) -> dict:
    keeper = HeldOut(problem, classes, **limits)
    for found in batches(logits, targets, size, seed=size):
        keeper.update(found)
    facts = keeper.to_dict()
    json.dumps(facts, allow_nan=False)
    return facts


@pytest.mark.parametrize("size", [1, 16, 1000])
def test_the_worst_are_those_of_highest_loss(size: int) -> None:
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(size=(300, 5)).astype(np.float32) * 3, generator.integers(0, 5, 300)
    facts = kept("classification", 5, logits, targets, size, worst=10)
    losses = functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(targets), reduction="none").numpy()
    order = np.argsort(-losses)[:10]
    assert [one["index"] for one in facts["worst"]] == order.tolist()
    probabilities = torch.tensor(logits).double().softmax(1).numpy()
    for one in facts["worst"]:
        row = one["index"]
        best = int(logits[row].argmax())
        assert (one["true"], one["predicted"]) == (str(targets[row]), str(best))
        assert one["loss"] == pytest.approx(losses[row])
        assert one["score"] == pytest.approx(probabilities[row, best])
        assert one["true_score"] == pytest.approx(probabilities[row, targets[row]])
        assert one["wrong"] == (best != targets[row])
    sure = probabilities.max(1)
    mean = sum(
        c * (m or 0) for c, m in zip(facts["calibration"]["count"], facts["calibration"]["confidence"], strict=True)
    )
    assert mean == pytest.approx(sure.sum())
    assert facts["num_samples"] == 300


def test_ties_go_to_the_first_samples() -> None:
    logits, targets = np.zeros((50, 2), np.float32), np.zeros(50, np.int64)
    for size in (1, 7, 50):
        assert [one["index"] for one in kept("classification", 2, logits, targets, size, worst=5)["worst"]] == list(
            range(5)
        )


def test_several_labels() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(60, 4)).astype(np.float32)
    targets = (generator.random((60, 4)) < 0.4).astype(np.float32)
    facts = kept("multilabel", 4, logits, targets, 16, worst=6)
    losses = functional.binary_cross_entropy_with_logits(
        torch.tensor(logits).double(), torch.tensor(targets).double(), reduction="none"
    )
    assert [one["index"] for one in facts["worst"]] == np.argsort(-losses.mean(1).numpy())[:6].tolist()
    assert sum(facts["calibration"]["count"]) == 240
    assert len(facts["label_ece"]) == 4
    worst = facts["worst"][0]
    assert worst["true"] == (", ".join(map(str, np.flatnonzero(targets[worst["index"]]))) or "none")


@pytest.mark.parametrize("shape", [(200,), (200, 1)])
def test_values(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(4)
    logits, targets = generator.normal(size=shape).astype(np.float32), generator.normal(size=shape).astype(np.float32)
    facts = kept("regression", None, logits, targets, 32, worst=4)
    errors = np.abs(logits.astype(np.float64) - targets).reshape(-1)
    assert [one["index"] for one in facts["worst"]] == np.argsort(-errors)[:4].tolist()
    assert sorted(facts["points"]) == sorted(
        [float(a), float(b)] for a, b in zip(targets.reshape(-1), logits.reshape(-1).astype(np.float64), strict=True)
    )
    assert "calibration" not in facts


def test_of_many_points_an_even_part_is_kept() -> None:
    values = np.arange(20_000, dtype=np.float64)
    small, large = (kept("regression", None, values, values, size, points=500) for size in (64, 4000))
    assert sorted(small["points"]) == sorted(large["points"])
    places = np.array([pair[0] for pair in small["points"]])
    assert len(places) == 500
    # 50 in each tenth, with a standard deviation of 7.
    assert np.histogram(places, 10, (0, 20_000))[0].min() > 25


def test_several_outputs_name_the_worst() -> None:
    logits, targets = np.zeros((3, 2)), np.array([[0.0, 0.0], [0.5, -3.0], [1.0, 0.0]])
    worst = kept("regression", None, logits, targets, 2)["worst"]
    assert [(one["index"], one["output"], one["true"]) for one in worst[:2]] == [(1, 1, -3.0), (2, 0, 1.0)]


def test_nothing_is_an_empty_record() -> None:
    assert HeldOut("classification", 2).to_dict() == {"problem": "classification", "num_samples": 0, "worst": []}
