"""evaluate and predict: a module, a result, a run, an ONNX file; what they keep and what must be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, r2_score
from torch import nn

import pyft
from pyft.errors import ConfigError, DataError, ExportError

CLASSES = ["ant", "bee", "cat"]


def samples(count: int = 50, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), [
        CLASSES[(number * 7 + number // 3) % 3] for number in range(count)
    ]


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, outputs))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> pyft.Result:
    """A run with export."""
    out = tmp_path_factory.mktemp("evaluate") / "run"
    return pyft.finetune(network(), samples(90, 1), out=out, epochs=2, progress=False, precision="fp32")


class TestModule:
    def test_metrics_are_those_of_scikit_learn(self) -> None:
        X, names = samples()
        model = network().train()
        metrics = pyft.evaluate(model, (X, names))
        with torch.no_grad():
            predicted = np.array(CLASSES)[model.eval()(X).argmax(1).numpy()]
        report = classification_report(names, predicted, output_dict=True, zero_division=0)
        assert metrics["accuracy"] == pytest.approx(accuracy_score(names, predicted), abs=1e-12)
        for row in metrics.per_class:
            for mine, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
                assert row[mine] == pytest.approx(report[row["name"]][theirs], abs=1e-12)
        np.testing.assert_array_equal(metrics.confusion, confusion_matrix(names, predicted, labels=CLASSES))

    def test_mode_statistics_and_random_state_are_left_alone(self) -> None:
        model = network().train()
        model[2].eval()
        before, state = model[1].running_mean.clone(), torch.get_rng_state()
        pyft.evaluate(model, samples())
        pyft.predict(model, samples()[0])
        assert [module.training for module in model] == [True, True, False, True]
        assert torch.equal(model[1].running_mean, before)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_order_of_the_outputs_can_be_given(self) -> None:
        X, names = samples()
        model = network()
        reverse = nn.Sequential(model, _Reverse())
        expected = pyft.evaluate(model, (X, names))
        found = pyft.evaluate(reverse, (X, names), classes=CLASSES[::-1])
        assert found["accuracy"] == expected["accuracy"]
        assert found.per_class[0]["name"] == "cat"

    def test_a_test_set_that_lacks_a_class(self) -> None:
        X, names = samples()
        kept = [number for number, name in enumerate(names) if name != "bee"]
        subset = (X[kept], [names[number] for number in kept])
        with pytest.raises(ConfigError, match="2 names for outputs of shape"):
            pyft.evaluate(network(), subset)
        metrics = pyft.evaluate(network(), subset, classes=CLASSES)
        assert [row["support"] > 0 for row in metrics.per_class] == [True, False, True]

    def test_regression(self) -> None:
        X, _ = samples()
        y = X.sum(1) * 0.3
        model = network(1).eval()
        with torch.no_grad():
            expected = r2_score(y.double().numpy(), model(X).double().numpy())
        assert pyft.evaluate(model, (X, y))["r2"] == pytest.approx(expected, abs=1e-9)
        rows = pyft.predict(model, X[:3], task="regression")
        assert [row["value"] for row in rows] == pytest.approx(model(X[:3]).flatten().tolist(), rel=1e-6)

    def test_classes_without_names(self) -> None:
        rows = pyft.predict(network(), samples()[0].numpy())
        assert len(rows) == 50
        assert {row["label"] for row in rows} <= {"0", "1", "2"}
        assert all(row["score"] == row["scores"].max() and row["scores"].sum() == pytest.approx(1) for row in rows)


class _Reverse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(1)


class TestRun:
    def test_every_form_gives_the_same(self, result: pyft.Result) -> None:
        data = samples(40, 5)
        expected = pyft.evaluate(result.model, data)
        for model, backend in (
            (result, "auto"),
            (result, "onnx"),
            (result.run_dir, "auto"),
            (str(result.onnx), "auto"),
        ):
            found = pyft.evaluate(model, data, backend=backend)
            np.testing.assert_array_equal(found.confusion, expected.confusion)
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)

    def test_predictions_of_the_file_keep_names_and_order(self, result: pyft.Result) -> None:
        X, _ = samples(11, 6)
        expected = result.predict(X)
        found = pyft.predict(result.onnx, X, batch_size=3)
        assert [row["label"] for row in found] == [row["label"] for row in expected]
        np.testing.assert_allclose(
            [row["scores"] for row in found], [row["scores"] for row in expected], rtol=1e-4, atol=1e-6
        )
        assert pyft.predict(result.onnx, []) == []

    def test_unknown_labels_are_named(self, result: pyft.Result) -> None:
        X, names = samples(6)
        with pytest.raises(DataError, match=r"'bea'.*'bee'"):
            pyft.evaluate(result.onnx, (X, [*names[:5], "bea"]))

    def test_a_module_of_the_users_own_cannot_be_built_from_the_folder(self, result: pyft.Result) -> None:
        with pytest.raises(ConfigError, match="a module of your own"):
            pyft.evaluate(result.run_dir, samples(), backend="torch")


BAD: dict[str, tuple[Any, Any, type[Exception], str, dict[str, Any]]] = {
    "a dict": (network(), {"train": samples(), "test": samples()}, ConfigError, "one of its values", {}),
    "no such backend": (network(), samples(), ConfigError, "backend='tf'", {"backend": "tf"}),
    "a module by onnx": (network(), samples(), ConfigError, r"give the \.onnx file", {"backend": "onnx"}),
    "nothing there": ("nowhere/run", samples(), ConfigError, "does not exist", {}),
    "no such file": ("nowhere/model.onnx", samples(), ExportError, "no ONNX file", {}),
    "no model": (3, samples(), ConfigError, "got int", {}),
    "texts for a module": (network(), (["a", "b"], ["x", "y"]), ConfigError, "preprocess", {}),
    "other inputs": (network(), (torch.zeros(2, 4), [0.5, float("nan")]), DataError, "NaN", {}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    model, data, error, match, keywords = BAD[name]
    with pytest.raises(error, match=match):
        pyft.evaluate(model, data, **keywords)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        pyft.evaluate(tmp_path, samples())
