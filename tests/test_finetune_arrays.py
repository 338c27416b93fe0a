"""finetune on arrays: networks of the user's own, every kind of problem, what is frozen, what is left alone."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyft
from pyft.errors import FrozenError


def blobs(count: int = 240, classes: int = 3, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clouds around distant centres: X (count, width), y (count,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99)) * 3
    y = torch.arange(count) % classes
    return centres[y] + torch.randn(count, width, generator=generator), y


def mlp(width: int = 6, outputs: int = 3, seed: int = 0) -> nn.Sequential:
    """Linear, BatchNorm, dropout and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, outputs)
    )  # fmt: skip


class Convolutions(nn.Module):
    """A small picture network with BatchNorm."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Recurrent(nn.Module):
    """Token numbers (B, T) through an LSTM."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.fc = nn.Linear(12, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.embedding(x))[0][:, -1])


def tune(model: nn.Module, data: Any, out: Path, **keywords: Any) -> pyft.Result:
    """finetune, quietly, without export and in fp32 unless asked for."""
    return pyft.finetune(model, data, out=out, **{"progress": False, "export": None, "precision": "fp32", **keywords})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[pyft.Result, nn.Module, Any]:
    """One run of an MLP with export, and the model and data that were given."""
    X, y = blobs()
    names = np.array(["cat", "ant", "bee"])[y.numpy()]
    model = mlp(outputs=7)
    out = tmp_path_factory.mktemp("mlp") / "run"
    result = tune(model, (X.numpy(), names), out, export="onnx", epochs=12, lr=2e-2, strategy="full")
    return result, model, (X, names)


class TestMlp:
    def test_it_learns_and_the_head_has_the_classes(self, tuned: Any) -> None:
        result, model, _ = tuned
        assert result.model is model
        assert model[4].out_features == 3
        assert result.classes == ["ant", "bee", "cat"]
        assert result.metrics["val_accuracy"] > 0.9

    def test_the_model_is_in_eval_mode_with_nothing_frozen(self, tuned: Any) -> None:
        _, model, _ = tuned
        assert not any(module.training for module in model.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    def test_metrics_are_those_of_scikit_learn(self, tuned: Any) -> None:
        result, model, (X, names) = tuned
        with torch.no_grad():
            predicted = np.array(result.classes)[model(X).argmax(1).numpy()]
        metrics = result.evaluate((X, list(names)))
        assert metrics["accuracy"] == pytest.approx(accuracy_score(names, predicted), abs=1e-12)
        assert metrics["macro_f1"] == pytest.approx(f1_score(names, predicted, average="macro"), abs=1e-12)
        np.testing.assert_array_equal(metrics.confusion, confusion_matrix(names, predicted, labels=result.classes))

    def test_the_onnx_file_gives_the_same(self, tuned: Any) -> None:
        result, _, (X, names) = tuned
        assert result.onnx is not None
        assert result.onnx.is_file()
        assert result.parity is not None
        assert result.parity["passed"]
        assert result.parity["max_rel"] <= 1e-4
        by_file = result.evaluate((X, names), backend="onnx")
        np.testing.assert_array_equal(by_file.confusion, result.evaluate((X, names)).confusion)

    def test_predictions_come_in_order(self, tuned: Any) -> None:
        result, model, (X, _) = tuned
        rows = result.predict(X[:9], batch_size=4)
        with torch.no_grad():
            expected = model(X[:9]).softmax(1).numpy()
        np.testing.assert_allclose(np.stack([row["scores"] for row in rows]), expected, rtol=1e-5, atol=1e-7)
        assert [row["label"] for row in rows] == [result.classes[i] for i in expected.argmax(1)]

    def test_the_run_folder_is_complete(self, tuned: Any) -> None:
        result, _, _ = tuned
        names = {path.name for path in result.run_dir.iterdir()}
        assert names >= {
            "config.json", "environment.json", "status.json", "plan.txt", "notes.txt", "metrics.csv", "metrics.json",
            "last.pt", "best.safetensors", "model.safetensors", "model.onnx", "parity.json", "preprocess.json",
            "timings.json",
        }  # fmt: skip
        assert "start.safetensors" not in names
        with open(result.run_dir / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(result.history) == 12
        assert float(rows[3]["val_accuracy"]) == result.history[3]["val_accuracy"]
        final = json.loads((result.run_dir / "metrics.json").read_text())
        assert final["val"]["values"]["accuracy"] == result.metrics["val_accuracy"]
        best = max(row["val_macro_f1"] for row in result.history)
        assert result.history[final["best_epoch"] - 1]["val_macro_f1"] == best == result.metrics["val_macro_f1"]

    def test_the_table_has_the_next_commands(self, tuned: Any) -> None:
        result, _, _ = tuned
        text = str(result)
        assert f"pyft.evaluate({str(result.onnx)!r}, data)" in text
        assert f"{result.metrics['val_accuracy']:.4f}" in text
        assert len(text.splitlines()) <= 20

    def test_the_weights_on_disk_are_those_of_the_model(self, tuned: Any) -> None:
        result, model, (X, _) = tuned
        again = mlp(seed=5)
        from pyft.run_dir import open_run

        opened = open_run(result.run_dir, again)
        assert opened.module is again
        with torch.no_grad():
            torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


def test_convolutions_with_frozen_batch_norm(run_dir: Path) -> None:
    X = torch.randn(90, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    X += torch.arange(90).remainder(3).view(-1, 1, 1, 1)
    model = Convolutions()
    before = copy.deepcopy(model.features.state_dict())
    result = tune(model, (X, np.arange(90) % 3), run_dir, freeze="features*", epochs=8, lr=5e-2)
    for name, value in model.features.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert result.plan is not None
    assert result.plan.trainable == ["head.weight", "head.bias"]
    assert result.metrics["val_accuracy"] > 0.6
    assert "features" in result.seconds


def test_the_plan_is_that_of_the_best_epoch(run_dir: Path) -> None:
    stages = [
        pyft.Stage("head", freeze=["0", "1"], epochs=10, kind="head"),
        pyft.Stage("too far", epochs=1, lr_scale=1e4),
    ]
    result = tune(mlp(), blobs(), run_dir, strategy=stages, lr=5e-2)
    assert [row["stage"] for row in result.history] == ["head"] * 10 + ["too far"]
    assert result.metrics["val_accuracy"] > result.history[-1]["val_accuracy"]
    assert result.plan is not None
    assert result.plan.trainable == ["4.weight", "4.bias"]
    assert all(parameter.requires_grad for parameter in result.model.parameters())


def test_a_table_s_columns_may_come_in_any_order(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    from pyft.cli import main

    X, y = blobs(width=3)
    rows = [[*map(str, values), f"c{label}"] for values, label in zip(X.tolist(), y.tolist(), strict=True)]
    table, other = tmp_path / "train.csv", tmp_path / "other.csv"
    table.write_text("\n".join(",".join(row) for row in [["a", "b", "c", "species"], *rows]))
    shuffled = [[row[3], row[2], "7", row[0], row[1]] for row in rows]
    other.write_text("\n".join(",".join(row) for row in [["species", "c", "spare", "a", "b"], *shuffled]))
    result = tune(mlp(3), table, run_dir, label_column="species", export="onnx", epochs=8, lr=2e-2, strategy="full")
    want = [row["label"] for row in pyft.predict(result, X)]
    for model in (result, result.onnx):
        assert [row["label"] for row in pyft.predict(model, other)] == want
        same, moved = (pyft.evaluate(model, path, label_column="species") for path in (table, other))
        assert (same.confusion == moved.confusion).all()
    assert main(["predict", str(result.onnx), str(other)]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == want
    other.write_text("a,c\n1,2\n")
    with pytest.raises(pyft.errors.DataError, match="missing: 'b'"):
        pyft.predict(result.onnx, other)


def test_lstm_on_token_numbers(run_dir: Path) -> None:
    tokens = torch.randint(0, 20, (120, 5), generator=torch.Generator().manual_seed(0))
    labels = ["high" if row[-1] >= 10 else "low" for row in tokens.tolist()]
    result = tune(Recurrent(5), (tokens, labels), run_dir, epochs=15, lr=3e-2)
    assert result.metrics["val_accuracy"] > 0.9
    assert [row["stage"] for row in result.history] == ["head"] * 5 + ["full"] * 10


def test_regression_with_export(run_dir: Path) -> None:
    X = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    y = X @ torch.tensor([1.0, -2.0, 0.5, 3.0]) + 1.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    result = tune(model, (X, y), run_dir, export="onnx", epochs=25, lr=5e-2, strategy="full")
    assert model[1].out_features == 1
    assert result.metrics["val_r2"] > 0.99
    assert result.classes is None
    assert result.confusion is None
    assert result.predict(X[:1])[0]["value"] == pytest.approx(model(X[:1]).item(), rel=1e-5)
    assert result.evaluate((X, y), backend="onnx")["rmse"] == pytest.approx(result.evaluate((X, y))["rmse"], rel=1e-4)


def test_two_regression_targets(run_dir: Path) -> None:
    X = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    y = torch.stack([X.sum(1), X[:, 0] - 2.5], 1)
    result = tune(nn.Sequential(nn.Linear(3, 9)), (X, y), run_dir, epochs=30, lr=0.1, strategy="full")
    assert result.model[0].out_features == 2
    assert result.metrics["val_r2"] > 0.98


def test_multilabel(run_dir: Path) -> None:
    X = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    result = tune(mlp(4, 3), (X, (X[:, :3] > 0).float()), run_dir, epochs=20, lr=3e-2, strategy="full")
    assert result.problem == "multilabel"
    assert result.metrics["val_micro_f1"] > 0.85
    assert set(result.predict(torch.tensor([[4.0, 4.0, -4.0, 0.0]]))[0]["labels"]) == {"0", "1"}


def test_head_on_cached_features_is_head_on_the_whole_model(run_dir: Path) -> None:
    """The same run with an augmentation that changes nothing has to run the whole model, and ends alike."""
    X, y = blobs()
    cached, whole = mlp(), mlp()
    keywords = {"strategy": "head", "epochs": 4, "lr": 1e-2}
    one = tune(cached, (X, y), run_dir / "cached", **keywords)
    two = tune(whole, (X, y), run_dir / "whole", augment=lambda x: x, **keywords)
    assert "features" in one.seconds
    assert "features" not in two.seconds
    assert not torch.equal(cached[4].weight, mlp()[4].weight)
    for name, value in cached.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(cached[0].weight, mlp()[0].weight)
    assert torch.equal(cached[1].running_mean, mlp()[1].running_mean)


def test_a_model_that_writes_to_a_frozen_layer_is_found_out(run_dir: Path) -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.body.weight.data.add_(1e-6)
            return self.head(self.body(x))

    with pytest.raises(FrozenError, match=r"body\.weight"):
        tune(Restless(), blobs(), run_dir, freeze="body", epochs=1)


def test_the_same_seed_gives_the_same_bits(run_dir: Path) -> None:
    weights = []
    for number, seed in enumerate((3, 3, 4)):
        model = mlp(outputs=9)
        tune(model, blobs(), run_dir / str(number), epochs=2, seed=seed)
        weights.append(model.state_dict())
        torch.rand(number + 1)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["0.weight"], weights[2]["0.weight"])


def test_data_and_random_state_are_left_alone(run_dir: Path) -> None:
    X, y = blobs()
    X_before, y_before, model = X.clone(), y.clone(), mlp()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    tune(model, (X, y), run_dir, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(X, X_before)
    assert torch.equal(y, y_before)


def test_dataset_loader_and_sets_by_name(run_dir: Path) -> None:
    X, y = blobs()
    dataset = TensorDataset(X, y)
    test = blobs(60, seed=7)
    by_arrays = tune(mlp(), (X, y), run_dir / "1", epochs=2)
    by_loader = tune(mlp(), DataLoader(dataset, batch_size=8), run_dir / "2", epochs=2)
    assert by_arrays.metrics == by_loader.metrics
    by_name = tune(mlp(), {"train": dataset, "test": test}, run_dir / "3", epochs=2)
    assert by_name.metrics["test_accuracy"] == by_name.evaluate(test)["accuracy"]
    assert sum(row["support"] for row in by_name.per_class) == 60


def test_without_validation_the_last_epoch_counts(run_dir: Path) -> None:
    result = tune(mlp(), blobs(), run_dir, val=0, epochs=2)
    assert result.metrics == {}
    assert len(result.history) == 2
    assert json.loads((run_dir / "metrics.json").read_text())["best_epoch"] is None


def test_own_loss_stages_and_sgd(run_dir: Path) -> None:
    calls = []

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        return nn.functional.cross_entropy(logits, targets)

    stages = [pyft.Stage("first", ["0", "1"], 1, kind="head"), pyft.Stage("second", "0", 2, lr_scale=0.5)]
    model = mlp()
    result = tune(
        model, blobs(), run_dir, loss=loss, strategy=stages, optimizer="sgd", schedule="plateau", accumulate=2, lr=0.1
    )
    assert calls
    assert [row["stage"] for row in result.history] == ["first", "second", "second"]
    assert torch.equal(model[0].weight, mlp()[0].weight)
    assert not torch.equal(model[1].weight, mlp()[1].weight)


def test_early_stopping_ends_a_stage(run_dir: Path) -> None:
    result = tune(mlp(), blobs(), run_dir, epochs=40, strategy="full", lr=3e-2, patience=2)
    assert len(result.history) < 40


def test_class_weight_lifts_a_rare_class(run_dir: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(400) % 20 == 0).long()
    X = torch.randn(400, 2, generator=generator) + y.view(-1, 1) * 1.0
    recalls = []
    for number, weight in enumerate((None, "balanced")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2))
        result = tune(
            model, (X, y), run_dir / str(number), class_weight=weight, epochs=10, lr=5e-2, strategy="full", val=0
        )
        recalls.append(result.evaluate((X, y)).per_class[1]["recall"])
    assert recalls[1] > recalls[0] + 0.3


def test_parameters_frozen_by_the_user_stay_so(run_dir: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    tune(model, blobs(), run_dir, epochs=2, strategy="full")
    assert torch.equal(model[0].weight, before)
    assert not model[0].weight.requires_grad


def test_a_run_folder_named_by_date(tmp_path: Path) -> None:
    paths = [tune(mlp(), blobs(), tmp_path / "runs" / "auto", epochs=1).run_dir for _ in range(2)]
    assert len(set(paths)) == 2
    assert all(
        path.name.endswith("-tabular-classification") or "-tabular-classification-" in path.name for path in paths
    )


@pytest.mark.parametrize("lean", [True, False])
def test_frozen_layers_run_lean_and_are_torchs_own_afterwards(run_dir: Path, lean: bool) -> None:
    model, seen = Convolutions(), set()
    model.features[3].register_forward_hook(lambda module, *_: seen.add(type(module).__name__))
    plan = pyft.freeze(model, "features.3", lean=lean)
    plan.release(model)
    x = torch.randn(48, 3, 8, 8)
    pyft.finetune(
        model, (x, torch.arange(48) % 3), freeze=plan, strategy="full", epochs=1, out=run_dir, export=None,
        progress=False,
    )  # fmt: skip
    assert ("LeanConv2d" in seen) == lean
    assert type(model.features[3]) is nn.Conv2d
