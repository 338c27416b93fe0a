"""Checks on sets made by hand, which no reader has looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyft.data.checks import check_data
from pyft.errors import DataError
from pyft.samples import Data, Samples


def data_of(
    train: Any, val: Any = None, classes: list[str] | None = None, problem: Any = "classification", kind: Any = "array"
) -> Data:
    def samples(pair: Any, name: str) -> Samples | None:
        return None if pair is None else Samples(kind, pair[0], torch.as_tensor(pair[1]), name)

    first = samples(train, "train")
    assert first is not None
    return Data(first, samples(val, "val"), None, kind, problem, classes or ["a", "b", "c"], "0")


def test_good_data_gives_no_warning() -> None:
    assert check_data(data_of((torch.zeros(6, 2), [0, 1, 2, 0, 1, 2]))) == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (data_of((torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))), "train: there is no sample"),
        (data_of((torch.zeros(3, 2), [1, 1, 1])), "all 3 samples have the label 'b'; a classifier needs two classes"),
        (data_of((torch.zeros(3, 2), [0, 1, 3])), r"1 label outside 0\.\.2, first 3 at row 2"),
        (data_of((torch.zeros(3, 2), [0, -1, 1])), r"1 label outside 0\.\.2, first -1 at row 1"),
        (data_of((torch.zeros(3, 2), [0, 1])), "3 inputs, 2 targets"),
        (
            data_of((torch.zeros(3, 2), [0, 1, 1]), (torch.zeros(3, 2), [0, 2, 2])),
            r"val \(val\): 1 label that training lacks: 'c' \(2 samples\)",
        ),
        (
            data_of((torch.tensor([[0.0, 1], [2, float("inf")]]), [0, 1])),
            "1 input NaN or infinite, in 1 row, first at row 1, column 1",
        ),
        (
            data_of((torch.zeros(2, 2), [0.5, float("nan")]), problem="regression"),
            "1 target NaN or infinite, in 1 row, first at row 1",
        ),
        (data_of((torch.zeros(2, 2), [0.5, 0.5]), problem="regression"), "all 2 targets are the same number"),
        (data_of((["a", "\t"], [0, 1]), kind="text"), "1 of 2 texts blank, first at row 1"),
        (data_of((["a", 3], [0, 1]), kind="text"), "1 of 2 texts not a str but int, first at row 1"),
        (
            data_of((torch.zeros(2, 2), [[1.0, 0.0, 0.0]] * 2), problem="multilabel"),
            "every label is the same in all samples",
        ),
    ],
)
def test_errors(data: Data, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        check_data(data)


def test_warnings() -> None:
    texts = ["Hello  World", "b", "c", "b"]
    warnings = check_data(data_of((texts, [0, 1, 0, 0]), (["hello world", "new"], [0, 1]), kind="text"))
    assert any("val (val): 1 of 2 texts also are in training" in warning for warning in warnings)
    assert any("1 texts occur with different labels, for instance 'b'" in warning for warning in warnings)
    skewed = check_data(data_of((torch.zeros(30, 1), [0] * 25 + [1] * 2 + [2] * 3)))
    assert any("imbalanced: 'b' 2, 'c' 3, the largest 25" in warning for warning in skewed)
    assert check_data(data_of((torch.zeros(12, 1), [0] * 10 + [1] * 2))) == []
    never = check_data(data_of((torch.zeros(2, 1), [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), problem="multilabel"))
    assert never == ["train: never positive: 'c'"]
