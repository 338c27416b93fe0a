"""Scores, labels and values behind the logits, against torch and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

from lone_graphs import floats, session_of

from pyft.errors import ConfigError
from pyft.export.onnx import export_module
from pyft.export.outputs import outputs_of
from pyft.export.run import OnnxModel

LOGITS = np.float32([[2.0, -1.0, 0.5], [-80.0, 90.0, 90.0], [0.0, 0.0, 0.0], [1e-8, -1e-8, 0.0]])


def outputs(problem: str, logits: np.ndarray, **keywords) -> dict[str, np.ndarray]:
    shape = ["batch", *logits.shape[1:]]
    graph = outputs_of(problem, shape, **keywords)
    session = session_of(graph, [floats("logits", *shape)])
    return dict(zip([v.name for v in session.get_outputs()], session.run(None, {"logits": logits}), strict=True))


def test_classification() -> None:
    found = outputs("classification", LOGITS, classes=["grün", "", "c"])
    assert list(found) == ["scores", "label_index", "label"]
    np.testing.assert_allclose(found["scores"], torch.softmax(torch.from_numpy(LOGITS), 1).numpy(), rtol=1e-6)
    assert found["label_index"].tolist() == [0, 1, 0, 0]
    assert found["label_index"].dtype == np.int64
    assert found["label"].tolist() == ["grün", "", "grün", "grün"]
    assert "label" not in outputs("classification", LOGITS)


def test_classification_of_each_token() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    found = outputs("classification", logits, classes=["a", "b", "c"])
    assert found["label"].shape == (2, 5)
    np.testing.assert_array_equal(found["label_index"], logits.argmax(-1))


def test_multilabel() -> None:
    found = outputs("multilabel", LOGITS, classes=["a", "b", "c"])
    assert list(found) == ["scores", "label_index"]
    np.testing.assert_allclose(found["scores"], torch.sigmoid(torch.from_numpy(LOGITS)).numpy(), rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(found["label_index"], LOGITS > 0)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2)])
def test_regression_in_the_unit_of_the_targets(shape: tuple[int, ...]) -> None:
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    target = {"mean": [250.5] if shape != (4, 2) else [250.5, -3.0], "std": [31.0] if shape != (4, 2) else [31.0, 0.5]}
    mean, std = (np.float32(target[key]) for key in ("mean", "std"))
    expected = logits * std + mean
    found = outputs("regression", logits, target=target)["value"]
    np.testing.assert_array_equal(found, expected.reshape(-1) if shape == (4, 1) else expected)
    np.testing.assert_array_equal(outputs("regression", logits)["value"], logits[:, 0] if shape == (4, 1) else logits)


def test_what_does_not_fit() -> None:
    for shape in (["batch"], ["batch", 1]):
        with pytest.raises(ConfigError, match="a column per class"):
            outputs_of("classification", shape)
    with pytest.raises(ConfigError, match="target: 3 means and 3 deviations"):
        outputs_of("regression", ["batch", 2], target={"mean": [0.0] * 3, "std": [1.0] * 3})
    assert outputs_of("", ["batch", 2]) is None


def test_logits_come_first_in_the_file_and_names_may_be_any(tmp_path) -> None:
    path = export_module(nn.Linear(2, 3), torch.randn(2, 2), tmp_path / "m.onnx", classes=["a", "b", "ß"])
    model = OnnxModel(path)
    assert [value.name for value in model.outputs] == ["logits", "scores", "label_index", "label"]
    assert model.meta.extra["pyft.format"] == "2"
    assert model.meta.precision == "fp32"


def test_an_input_with_the_name_of_an_output(tmp_path) -> None:
    class Scores(nn.Module):
        def forward(self, scores):
            return scores * 2

    with pytest.raises(ConfigError, match="the name of its output 'scores': rename the input"):
        export_module(Scores(), {"scores": torch.randn(2, 3)}, tmp_path / "m.onnx", classes=["a", "b", "c"])
