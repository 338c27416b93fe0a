"""Two files on the same data: classes by name, other input forms, regression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyft
from pyft.errors import ConfigError, DataError

pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

from linear_files import CLASSES, array_file

generator = np.random.default_rng(0)
WEIGHT = generator.standard_normal((4, 3)).astype(np.float32)
OTHER = WEIGHT + 0.3 * generator.standard_normal((4, 3)).astype(np.float32)
X = generator.standard_normal((200, 4)).astype(np.float32)
Y = np.array(CLASSES)[(X @ WEIGHT + generator.standard_normal((200, 3))).argmax(1)].tolist()
A, B = (np.array(CLASSES)[(X @ weight).argmax(1)] for weight in (WEIGHT, OTHER))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    turned = [2, 0, 1]
    return {
        "a": array_file(folder / "a.onnx", WEIGHT, classes=CLASSES),
        "b": array_file(folder / "b.onnx", OTHER, classes=CLASSES),
        "turned": array_file(folder / "turned.onnx", OTHER[:, turned], classes=[CLASSES[n] for n in turned]),
        "strange": array_file(folder / "strange.onnx", OTHER, classes=["ant", "bee", "dog"]),
        "fewer": array_file(folder / "fewer.onnx", OTHER[:, :2], classes=CLASSES[:2]),
        "values": array_file(folder / "values.onnx", WEIGHT[:, :1], task="regression"),
        "scaled": array_file(
            folder / "scaled.onnx", WEIGHT[:, :1], task="regression", target_scale={"mean": [1.0], "std": [2.0]}
        ),
        "nameless": array_file(folder / "nameless.onnx", WEIGHT),
    }


def test_counts_are_those_of_the_predictions(files: dict[str, Path]) -> None:
    found = pyft.compare(files["a"], files["b"], (X, Y), batch_size=7)
    y = np.array(Y)
    assert found["accuracy"].a == pytest.approx((y == A).mean())
    assert found["accuracy"].b == pytest.approx((y == B).mean())
    assert found.mcnemar is not None
    assert found.mcnemar.only_a == ((y == A) & (y != B)).sum()
    assert found.mcnemar.only_b == ((y != A) & (y == B)).sum()
    assert found.num_disagreeing == (A != B).sum()
    rows = [(row["true"], row["a"], row["b"]) for row in found.disagreeing]
    places = np.flatnonzero(A != B)[:10]
    assert rows == [(y[n], A[n], B[n]) for n in places]
    assert found.names == (str(files["a"]), str(files["b"]))


def test_classes_are_matched_by_name(files: dict[str, Path]) -> None:
    expected = pyft.compare(files["a"], files["b"], (X, Y)).to_dict()
    found = pyft.compare(files["a"], files["turned"], (X, Y)).to_dict()
    assert {**found, "b": None} == {**expected, "b": None}


def test_regression_in_the_unit_of_the_targets(files: dict[str, Path]) -> None:
    y = (X @ WEIGHT[:, :1])[:, 0] * 2 + 1
    found = pyft.compare(files["values"], files["scaled"], (X, y), metric="rmse")
    assert found["rmse"].b == pytest.approx(0, abs=1e-5)
    assert found["rmse"].a == pytest.approx(
        np.sqrt(((X @ WEIGHT[:, :1])[:, 0] - y).astype(np.float64) ** 2).mean(), rel=1
    )
    assert found["rmse"].high < 0
    assert found.disagreeing[0]["b"] == pytest.approx(y[found.disagreeing[0]["row"]], rel=1e-5)


def test_files_without_names_take_those_of_the_data(files: dict[str, Path]) -> None:
    found = pyft.compare(files["nameless"], files["nameless"], (X, Y))
    assert found["accuracy"].a == pytest.approx((np.array(Y) == A).mean())


@pytest.mark.parametrize(
    ("b", "data", "error", "match"),
    [
        ("strange", (X, Y), ConfigError, "a alone has 'cat', b alone 'dog'"),
        ("fewer", (X, Y), ConfigError, "a alone has 'cat', b alone none"),
        ("values", (X, Y), ConfigError, "a is for classification, b for regression"),
        ("b", X, DataError, "no labels"),
        ("b", (X, ["dog"] * 200), DataError, "'dog'"),
    ],
)
def test_what_cannot_be_compared(files: dict[str, Path], b: str, data: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pyft.compare(files["a"], files[b], data)
