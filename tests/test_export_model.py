"""`pyft.export_onnx` on modules, results and runs: what the file takes, what it says, and its proof."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

import pyft
from pyft.errors import ConfigError, DataError
from pyft.export.run import OnnxModel


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> pyft.Result:
    """A regression on a table with words and gaps, tuned for a moment."""
    folder = tmp_path_factory.mktemp("houses")
    generator = np.random.default_rng(0)
    with open(folder / "houses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "town", "price"])
        for _ in range(80):
            size, town = generator.normal(100, 30), generator.choice(["Ulm", "Bonn"])
            writer.writerow(["" if generator.random() < 0.1 else f"{size:.2f}", town, f"{size * 3000:.0f}"])
    torch.manual_seed(0)
    return pyft.finetune(
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), folder / "houses.csv", task="tabular-regression",
        strategy="full", epochs=1, out=folder / "run", progress=False, label_column="price", preprocess="table",
    )  # fmt: skip


def test_a_run_leaves_a_file_of_named_columns(houses: pyft.Result) -> None:
    assert houses.onnx is not None
    file = OnnxModel(houses.onnx)
    assert [(value.name, value.shape) for value in file.inputs] == [("size", ("batch",)), ("town", ("batch",))]
    assert [value.name for value in file.outputs] == ["logits", "value"]
    rows: dict[str, Any] = {"size": [120.0, float("nan")], "town": ["Ulm", "Rome"]}
    expected = [row["value"] for row in houses.predict(rows)]
    found = file.run({"size": np.float32(rows["size"]), "town": np.array(rows["town"], dtype=object)})
    np.testing.assert_allclose(found["value"], expected, rtol=1e-5)
    assert abs(np.mean(expected)) > 1000
    meta = file.meta
    config = json.loads((houses.run_dir / "config.json").read_text())
    assert meta.extra["pyft.format"] == "2"
    assert (meta.inputs_form, meta.precision) == ("raw", "fp32")
    assert meta.data_hash == config["data"]["fingerprint"]
    assert meta.weights_hash == pyft.run_dir.fingerprint_state(houses.model)
    assert meta.metrics == pytest.approx(houses.metrics)


@pytest.mark.parametrize("inputs", ["raw", "tensor"])
def test_a_result_is_exported_again(houses: pyft.Result, inputs: Any, tmp_path: Path) -> None:
    path = houses.export_onnx(tmp_path / "again.onnx", inputs=inputs, metadata={"owner": "me"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.onnx", "again.parity.json"]
    assert json.loads((tmp_path / "again.parity.json").read_text())["passed"]
    file = OnnxModel(path)
    assert [value.name for value in file.inputs] == (["size", "town"] if inputs == "raw" else ["input"])
    assert file.meta.inputs_form == inputs
    assert file.meta.extra["owner"] == "me"


def test_a_module_of_its_own_and_labelled_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    x, y = torch.randn(30, 4), ["no", "yes"] * 15
    path = pyft.export_onnx(model, tmp_path / "m.onnx", data=(x, y))
    assert model.training
    file = OnnxModel(path)
    assert file.meta.classes == ["no", "yes"]
    parity = json.loads((tmp_path / "m.parity.json").read_text())
    assert parity["num_samples"] == 30
    assert set(parity["metrics"]) == {"torch", "onnx"}


def test_a_module_of_pictures_without_data_is_tried_on_noise(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")
    from pyft.data.images import ImagePreprocess

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    pyft.export_onnx(net, tmp_path / "m.onnx", preprocess=ImagePreprocess(20, 24), task="image-classification")
    parity = json.loads((tmp_path / "m.parity.json").read_text())
    assert parity["num_samples"] == 3


def test_a_wrong_preprocessing_in_the_graph_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image", reason="pip install 'pyft[image]'")
    import pyft.export.raw_image as front
    from pyft.data.images import ImagePreprocess
    from pyft.errors import ExportError

    right = front.normalised
    monkeypatch.setattr(front, "normalised", lambda g, p, scale, mean, std: right(g, p, scale, [0.4, 0.4, 0.4], std))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ExportError, match="does not behave like"):
        pyft.export_onnx(net, tmp_path / "m.onnx", preprocess=ImagePreprocess(20), task="image-classification")
    assert not (tmp_path / "m.onnx").exists()
    assert (tmp_path / "m.failed.onnx").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "example: give a batch as the model takes it"),
        ({"inputs": "bytes"}, "inputs='bytes': expected 'auto', 'raw'"),
        ({"precision": "int4"}, "precision='int4': expected one of fp32"),
        ({"precision": "int8", "example": torch.randn(2, 4)}, "labelled samples: give data="),
        ({"example": torch.randn(2, 4), "inputs": "raw"}, "no preprocessing is known"),
        ({"example": torch.randn(2, 4), "metadata": {"pyft.x": 1}}, "begin with 'pyft.'"),
        ({"example": torch.randn(2, 4), "detection": {}}, "detection= is for task='detection'"),
    ],
)
def test_arguments_that_do_not_fit(words: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        pyft.export_onnx(nn.Linear(4, 2), tmp_path / "m.onnx", **words)
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_data_is_gone(houses: pyft.Result, tmp_path: Path) -> None:
    source = Path(json.loads((houses.run_dir / "config.json").read_text())["arguments"]["data"])
    away = source.rename(source.with_suffix(".away"))
    try:
        with pytest.raises(DataError, match="the data of the run is needed"):
            houses.export_onnx(tmp_path / "m.onnx")
    finally:
        away.rename(source)
