"""Metrics, speed and predictions of an exported file without torch, against scikit-learn."""

from __future__ import annotations

import csv
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, r2_score, root_mean_squared_error

import pyft
from pyft import onnx_runtime
from pyft.errors import ConfigError, DataError, ExportError
from pyft.evaluation.metrics import RegressionCounter
from pyft.onnx_runtime.evaluation import open_file

pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

from linear_files import CLASSES, array_file, image_file
from small_graphs import save_graph

WEIGHT = np.random.default_rng(7).standard_normal((4, 3)).astype(np.float32)


def samples(count: int = 40, seed: int = 3) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((count, 4)).astype(np.float32)
    return X, [CLASSES[number] for number in generator.integers(0, 3, count)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return array_file(tmp_path_factory.mktemp("files") / "array.onnx", WEIGHT, classes=CLASSES)


class TestMetrics:
    def test_those_of_scikit_learn(self, path: Path) -> None:
        X, names = samples()
        found = onnx_runtime.evaluate(path, (X, names), batch_size=7)
        logits = X @ WEIGHT
        predicted = np.array(CLASSES)[logits.argmax(1)]
        shares = torch.from_numpy(logits).double().softmax(1).numpy()
        assert found["accuracy"] == pytest.approx(accuracy_score(names, predicted), abs=1e-12)
        assert found["macro_f1"] == pytest.approx(f1_score(names, predicted, average="macro"), abs=1e-12)
        assert found["loss"] == pytest.approx(log_loss(names, shares, labels=CLASSES), rel=1e-6)
        np.testing.assert_array_equal(found.confusion, confusion_matrix(names, predicted, labels=CLASSES))

    @pytest.mark.parametrize("form", ["tsv", "csv", "npz", "dict", "frame", "list", "tensor", "columns.npz", "dataset"])
    def test_every_form_of_data(self, path: Path, tmp_path: Path, form: str) -> None:
        X, names = samples()
        columns: dict[str, Any] = {f"x{n}": X[:, n] for n in range(4)} | {"label": names}
        data: Any = {
            "dict": columns,
            "list": list(zip(X, names, strict=True)),
            "tensor": (torch.from_numpy(X), names),
            "dataset": _Dataset(X, [CLASSES.index(name) for name in names]),
        }.get(form, tmp_path / f"data.{form}")
        if form in ("tsv", "csv"):
            with open(data, "w", newline="") as file:
                writer = csv.writer(file, delimiter="\t" if form == "tsv" else ",")
                writer.writerows([list(columns), *zip(*(map(str, values) for values in columns.values()), strict=True)])
        elif form == "npz":
            np.savez(data, X=X, y=np.array(names))
        elif form == "columns.npz":
            np.savez(data, **columns)
        elif form == "frame":
            data = pytest.importorskip("pandas").DataFrame(columns)
        found = pyft.evaluate(path, data)
        expected = onnx_runtime.evaluate(path, (X, names))
        np.testing.assert_array_equal(found.confusion, expected.confusion)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)

    def test_regression_in_its_own_unit(self, tmp_path: Path) -> None:
        X, _ = samples()
        weight = WEIGHT[:, :1]
        y = (X @ weight)[:, 0] * 30 + 500 + np.random.default_rng(0).standard_normal(40)
        scale = {"mean": [500.0], "std": [30.0]}
        scaled = array_file(tmp_path / "scaled.onnx", weight, task="regression", target_scale=scale)
        valued = save_graph(
            tmp_path / "valued.onnx",
            {"input": (np.float32, ["batch", 4])},
            [
                ("MatMul", ["input", "weight"], ["logits"]),
                ("Mul", ["logits", "std"], ["wide"]),
                ("Add", ["wide", "mean"], ["value"]),
            ],
            {"logits": (np.float32, ["batch", 1]), "value": (np.float32, ["batch", 1])},
            {"weight": weight, "std": np.array([30], np.float32), "mean": np.array([500], np.float32)},
            kind="array",
            task="regression",
            target_scale=scale,
        )
        values = (X @ weight)[:, 0] * 30 + 500
        for file in (scaled, valued):
            found = pyft.evaluate(file, (X, y))
            assert found["rmse"] == pytest.approx(root_mean_squared_error(y, values), rel=1e-5)
            assert found["r2"] == pytest.approx(r2_score(y, values), rel=1e-5)
            assert [row["value"] for row in pyft.predict(file, X)] == pytest.approx(values.tolist(), rel=1e-5)

    def test_multilabel(self, tmp_path: Path) -> None:
        X, _ = samples()
        y = (np.random.default_rng(1).random((40, 3)) > 0.5).astype(int)
        file = array_file(tmp_path / "multi.onnx", WEIGHT, task="tabular-multilabel", classes=CLASSES)
        found = pyft.evaluate(file, (X, y))
        assert found["micro_f1"] == pytest.approx(f1_score(y, X @ WEIGHT > 0, average="micro"), abs=1e-12)
        assert pyft.predict(file, X[:1])[0]["labels"] == [
            c for c, v in zip(CLASSES, X[0] @ WEIGHT, strict=True) if v > 0
        ]

    def test_folder_of_pictures(self, tmp_path: Path, colours: Path) -> None:
        file = image_file(tmp_path / "image.onnx")
        found = pyft.evaluate(file, colours)
        assert found["accuracy"] == 1.0
        assert found.num_samples == 60
        pixels = [np.asarray(Image.open(one)) for one in sorted((colours / "blue").iterdir())]
        rows = pyft.predict(file, np.stack(pixels))
        assert [row["label"] for row in rows] == ["blue"] * 20
        assert pyft.predict(file, Image.fromarray(pixels[0]))[0]["label"] == "blue"
        labelled = onnx_runtime.evaluate(file, (np.stack(pixels), ["blue"] * 19 + ["red"]))
        assert labelled["accuracy"] == pytest.approx(0.95)

    def test_a_file_that_says_nothing(self, tmp_path: Path) -> None:
        X, names = samples()
        plain = save_graph(
            tmp_path / "plain.onnx",
            {"x": (np.float32, ["batch", 4])},
            [("MatMul", ["x", "weight"], ["y"])],
            {"y": (np.float32, ["batch", 3])},
            {"weight": WEIGHT},
        )
        found = pyft.evaluate(plain, (X, names))
        predicted = np.array(CLASSES)[(X @ WEIGHT).argmax(1)]
        assert found["accuracy"] == pytest.approx(accuracy_score(names, predicted))
        reverse = pyft.evaluate(plain, (X, names), classes=CLASSES[::-1])
        predicted = np.array(CLASSES[::-1])[(X @ WEIGHT).argmax(1)]
        assert reverse["accuracy"] == pytest.approx(accuracy_score(names, predicted))


class _Dataset:
    def __init__(self, X: np.ndarray, y: list[int]) -> None:
        self.X, self.y = X, y

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self.X[number], self.y[number]


class TestSpeed:
    def test_what_is_reported(self, path: Path) -> None:
        X, names = samples(100)
        found = onnx_runtime.evaluate(path, (X, names), batch_size=10, threads=1)
        speed = found.speed
        assert speed is not None
        assert speed.provider == "CPUExecutionProvider"
        assert (speed.batch_size, speed.threads) == (10, 1)
        assert 0 < speed.samples_per_second < speed.model_samples_per_second
        for low, high in (speed.batch_ms, speed.single_ms):  # type: ignore[misc]
            assert 0 < low <= high < 10_000
        assert found.to_dict()["speed"]["single_ms"] == list(speed.single_ms)  # type: ignore[arg-type]
        text = str(found)
        assert "samples per second" in text
        assert "batch of 10" in text
        assert text.startswith("classification: 100 samples, 3 classes")
        without = onnx_runtime.evaluate(path, (X, names), single_samples=0).speed
        assert without is not None
        assert without.single_ms is None

    def test_a_slow_file_is_told_slow(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = onnx_runtime.load(path)
        run = type(model).run

        def slow(self: Any, feed: Any, outputs: Any = None) -> Any:
            import time

            time.sleep(0.01 * len(feed["input"]))
            return run(self, feed, outputs)

        monkeypatch.setattr(type(model), "run", slow)
        speed = onnx_runtime.evaluate(model, samples(12), batch_size=4, single_samples=3).speed
        assert speed is not None
        assert speed.batch_ms[0] >= 40
        assert speed.single_ms is not None
        assert 10 <= speed.single_ms[0] < speed.batch_ms[0]
        assert speed.model_samples_per_second < 100

    def test_one_sample(self, path: Path) -> None:
        X, names = samples(1)
        found = onnx_runtime.evaluate(path, (X, names))
        assert found.num_samples == 1
        assert np.isfinite(found.speed.batch_ms).all()  # type: ignore[union-attr]


def test_outputs_are_not_kept(tmp_path: Path) -> None:
    """2,000 samples with 2,000 outputs each: 16 MB of logits, of which a batch is 64 kB."""
    weight = np.random.default_rng(0).standard_normal((2, 2000)).astype(np.float32)
    file = array_file(tmp_path / "wide.onnx", weight, task="regression")
    X = np.random.default_rng(1).standard_normal((2000, 2)).astype(np.float32)
    model = onnx_runtime.load(file)

    y = np.broadcast_to(np.arange(2000, dtype=np.float32), (2000, 2000))
    subject = open_file(model, "auto", None, None, "CPUExecutionProvider", None)

    counter = RegressionCounter()
    tracemalloc.start()
    for values, index in subject.answers(X, 8, None):
        counter.update(y[index], values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
    assert counter.total == 2000


BAD: dict[str, tuple[Any, type[Exception], str, dict[str, Any]]] = {
    "no labels": (samples()[0], DataError, r"no labels; give \(X, y\)", {}),
    "several sets": ({"train": samples(), "test": samples()}, DataError, "expected one set", {}),
    "unknown label": ((samples(2)[0], ["ant", "bea"]), DataError, "'bea'.*nearest: 'bee'", {}),
    "lengths": ((samples()[0], ["ant"]), DataError, "X has 40 samples, y has 1 label", {}),
    "NaN": ((np.full((2, 4), np.nan, np.float32), ["ant", "bee"]), DataError, "8 inputs NaN or infinite", {}),
    "no sample": ((np.empty((0, 4), np.float32), []), DataError, "there is no sample in it", {}),
    "texts": ((["a", "b"], ["ant", "bee"]), DataError, "array|numbers|text inputs", {}),
    "shape": ((np.ones((2, 5), np.float32), ["ant", "bee"]), ConfigError, r"shape \(batch, 4\), got \(2, 5\)", {}),
    "classes": (samples(), ConfigError, r"4 names for outputs of shape \(40, 3\)", {"classes": [*CLASSES, "dog"]}),
    "batch size": (samples(), ConfigError, "batch_size=0", {"batch_size": 0}),
    "provider": (
        samples(),
        ExportError,
        "has no NoSuchExecutionProvider here",
        {"provider": "NoSuchExecutionProvider"},
    ),
    "backend": (samples(), ConfigError, "is run by onnxruntime", {"backend": "torch"}),
    "missing file": ("nowhere.tsv", DataError, "no such file or folder: 'nowhere.tsv'", {}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_evaluated(path: Path, name: str) -> None:
    data, error, match, keywords = BAD[name]
    with pytest.raises(error, match=match):
        pyft.evaluate(path, data, **keywords)


def test_a_file_that_finds_boxes(tmp_path: Path) -> None:
    file = array_file(tmp_path / "boxes.onnx", WEIGHT, task="image-detection")
    with pytest.raises(ConfigError, match="finds boxes, of which no metrics are taken"):
        pyft.evaluate(file, samples())


def test_a_provider_for_a_module() -> None:
    with pytest.raises(ConfigError, match="torch runs this model"):
        pyft.evaluate(torch.nn.Linear(4, 3), samples(), provider="CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("name", "write", "match"),
    [
        ("x.npy", lambda path: np.save(path, np.ones((2, 4))), "holds no labels"),
        ("x.npz", lambda path: path.write_bytes(b"PK nothing"), "not a file of arrays"),
        ("x.npz", lambda path: np.savez(path, a=np.ones((2, 4)), b=np.ones(2)), "expected X and y by name"),
        ("x.npz", lambda path: np.savez(path, X=np.array([{}], object), y=[0]), "not a file of arrays"),
    ],
)
def test_files_of_arrays_that_do_not_fit(path: Path, tmp_path: Path, name: str, write: Any, match: str) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError, match=match):
        pyft.evaluate(path, tmp_path / name)


def test_a_run_with_its_file_and_what_predict_takes(path: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    X, _ = samples(5)
    np.save(tmp_path / "x.npy", X)
    expected = [CLASSES[number] for number in (X @ WEIGHT).argmax(1)]
    for model, raw in ((tmp_path, X), (path, X.tolist()), (path, tmp_path / "x.npy"), (onnx_runtime.load(path), X)):
        assert [row["label"] for row in onnx_runtime.predict(model, raw, batch_size=2)] == expected
    assert onnx_runtime.predict(path, []) == []
    model = onnx_runtime.load(path)
    onnx_runtime.predict(model, X, preprocess={"kind": "array"})
    assert model.meta.preprocess is None
