"""The validation split, compared with independent counting."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyft.data.sources import load_data
from pyft.data.splits import split_samples
from pyft.errors import DataError


def split(
    targets: Any, val: Any = 0.2, *, problem: Any = "classification", stratify: bool = True, seed: int = 0
) -> Any:
    return split_samples(torch.as_tensor(targets), problem, val, stratify=stratify, seed=seed, classes=None)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=12),
    st.floats(0.05, 0.6),
    st.integers(0, 2**40),
)
def test_each_class_gives_its_share(sizes: list[int], fraction: float, seed: int) -> None:
    targets = np.repeat(np.arange(len(sizes)), sizes)
    targets = targets[np.random.default_rng(seed).permutation(len(targets))]
    wanted = int(np.floor(fraction * len(targets) + 0.5))
    if wanted < 1 or wanted > sum(size - 1 for size in sizes):
        with pytest.raises(DataError):
            split(targets, fraction, seed=seed)
        return
    train, val, _ = split(targets, fraction, seed=seed)
    assert sorted(train.tolist() + val.tolist()) == list(range(len(targets)))
    assert len(val) == wanted
    given_up = Counter(targets[val.numpy()].tolist())
    kept = Counter(targets[train.numpy()].tolist())
    assert all(kept[number] >= 1 for number in range(len(sizes)))
    # Within one sample of the exact share, unless classes of one sample could not give theirs.
    missing = sum(wanted * size / len(targets) for size in sizes if size == 1)
    for number, size in enumerate(sizes):
        if size > 1:
            exact = wanted * size / len(targets)
            assert exact - 1 < given_up[number] < exact + 1 + missing


def test_split_is_the_same_on_any_machine() -> None:
    # Written down once: other numbers mean that old runs can no longer be repeated.
    _, val, _ = split([0, 1] * 10, 0.25, seed=3)
    assert val.tolist() == [1, 4, 11, 12, 18]


def test_split_is_a_function_of_the_seed_alone() -> None:
    targets = [0, 1, 2] * 30
    first = split(targets, seed=5)
    torch.manual_seed(99)
    np.random.seed(99)
    again = split(targets, seed=5)
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], split(targets, seed=6)[1])


def test_samples_are_drawn_from_the_whole_class() -> None:
    drawn = Counter(number for seed in range(60) for number in split([0] * 10 + [1] * 10, 0.2, seed=seed)[1].tolist())
    assert set(drawn) == set(range(20))
    assert max(drawn.values()) < 30


def test_single_sample_classes_stay_in_training() -> None:
    data = load_data((np.zeros((12, 1)), ["a"] * 6 + ["b"] * 5 + ["lonely"]), val=0.3)
    assert data.val is not None
    assert data.val.targets is not None
    assert 2 not in data.val.targets.tolist()
    assert any("1 class with one sample, kept for training and not validated: 'lonely'" in note for note in data.notes)


@pytest.mark.parametrize("val", [-0.1, 1.0, 1.5, float("nan"), -1, 10, 11, "0.2", True, [0.2]])
def test_val_out_of_range(val: Any) -> None:
    with pytest.raises(DataError, match="val="):
        split([0, 1] * 5, val)


@pytest.mark.parametrize(
    ("val", "count"), [(None, 0), (0, 0), (0.0, 0), (1, 1), (3, 3), (0.25, 3), (np.float32(0.5), 5)]
)
def test_val_counts(val: Any, count: int) -> None:
    assert len(split([0, 1] * 5, val)[1]) == count


@pytest.mark.parametrize(
    ("targets", "val", "expected"),
    [
        ([0, 1], 0.2, "2 samples cannot be split"),
        ([0, 1, 2, 3], 0.5, "each of the 4 classes keeps one for training"),
        ([0, 1] * 3, 0.9, "val=0.9"),
    ],
)
def test_too_few_samples(targets: list[int], val: float, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        split(targets, val)


def test_regression_and_unstratified_splits() -> None:
    train, val, _ = split(torch.linspace(0, 1, 50), 0.2, problem="regression")
    assert (len(train), len(val)) == (40, 10)
    assert len(split([0] * 99 + [1], 0.2, stratify=False)[1]) == 20


def test_multilabel_keeps_rare_labels_in_training() -> None:
    generator = np.random.default_rng(1)
    targets = (generator.random((200, 6)) < [0.5, 0.3, 0.1, 0.05, 0.02, 0.02]).astype(np.float32)
    for seed in range(20):
        train, val, _ = split(targets, 0.3, problem="multilabel", seed=seed)
        assert len(val) == 60
        rarest = targets[:, 4:].sum(0) > 0
        assert bool((targets[train.numpy()][:, 4:].sum(0)[rarest] > 0).all())


def test_no_split_when_validation_is_given() -> None:
    data = load_data({"train": (np.zeros((4, 1)), [0, 1, 0, 1]), "val": (np.zeros((2, 1)), [0, 1])}, val=0.5)
    assert len(data.train) == 4


def test_banking77_shares(shared_data: Path) -> None:
    data = load_data(shared_data / "banking77" / "train.tsv", val=0.1, seed=7)
    assert data.val is not None
    whole = Counter(
        line.split("\t")[1] for line in (shared_data / "banking77" / "train.tsv").read_text().split("\n")[1:-1]
    )
    held = Counter(data.classes[number] for number in data.val.targets.tolist())  # type: ignore[index, union-attr]
    assert sum(held.values()) == 1000
    assert all(abs(held[name] - whole[name] * 1000 / 10003) < 1 for name in whole)
