"""The unit of a regression model's outputs: one scale in loss, metrics, predictions, run folder and ONNX file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

import pyft
from pyft.errors import CheckpointError, ConfigError
from pyft.run_dir import open_run
from pyft.target_scale import TargetScale, choose_scale
from pyft.training.objectives import make_loss

finite = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)


def prices(count: int = 200, outputs: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """X (count, 4) and prices of about 200,000 with a deviation of about 80,000."""
    X = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    y = (
        200_000
        + 80_000 * (X @ torch.tensor([0.6, -0.6, 0.4, 0.3]))
        + 1000 * torch.randn(count, generator=torch.Generator().manual_seed(1))
    )
    return X, y if outputs == 1 else torch.stack([y, X[:, 0] * 1e-3], 1)


def tune(model: nn.Module, data: Any, out: Path, **keywords: Any) -> pyft.Result:
    options = {"strategy": "full", "epochs": 10, "lr": 3e-2, "export": None, "progress": False, "batch_size": 16}
    return pyft.finetune(model, data, out=out, **{**options, **keywords})


def linear(outputs: int = 1, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, outputs))


@settings(deadline=None, max_examples=25)
@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=2, max_side=6), elements=finite))
def test_as_scikit_learn_and_the_same_bits_in_torch_and_numpy(y: np.ndarray) -> None:
    from sklearn.preprocessing import StandardScaler

    scale = TargetScale.of(y)
    peer = StandardScaler().fit(y.reshape(len(y), -1).astype(np.float64))
    np.testing.assert_allclose(scale.mean, peer.mean_, rtol=1e-6, atol=1e-7 * np.abs(y).max())
    # scikit-learn also calls a column constant that varies in its last digit only.
    varied = np.sqrt(peer.var_) > 1e-6 * np.abs(peer.mean_)
    np.testing.assert_allclose(np.array(scale.std)[varied], peer.scale_[varied], rtol=1e-6)
    assert all(std > 0 for std in scale.std)
    as_torch = scale.scale(torch.from_numpy(y))
    assert as_torch.numpy().tobytes() == scale.scale(y).tobytes()
    assert scale.unscale(as_torch).numpy().tobytes() == scale.unscale(scale.scale(y)).tobytes()
    assert TargetScale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale
    assert scale.unscale(as_torch.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("value", [{}, {"mean": [1.0], "std": [0.0]}, {"mean": [1.0, 2.0], "std": [1.0]}, {"mean": 3}])
def test_a_damaged_scale(value: Any) -> None:
    with pytest.raises(CheckpointError, match="scale of the targets is damaged"):
        TargetScale.from_dict(value)


def test_a_scale_of_other_outputs() -> None:
    with pytest.raises(ConfigError, match="the scale is of 2 outputs, the model gives shape"):
        TargetScale((0.0, 0.0), (1.0, 1.0)).unscale(torch.zeros(3, 4))


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_the_loss_is_of_scaled_targets(loss: str, shape: tuple[int, ...]) -> None:
    objective = make_loss("regression", loss)
    targets, logits = torch.linspace(3, 9, 5).reshape(shape), torch.linspace(-1, 1, 5).reshape(5, 1)
    objective.target_scale = TargetScale.of(targets)
    mean, std = float(targets.double().mean()), float(targets.double().std(correction=0))
    peer = {"mse": nn.MSELoss(), "l1": nn.L1Loss(), "huber": nn.HuberLoss()}[loss]
    expected = peer(logits.flatten().double(), ((targets - mean) / std).flatten())
    assert objective(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.unit == pytest.approx({"mse": std**2, "l1": std, "huber": 1}[loss], rel=1e-6)


def test_metrics_predictions_and_files_are_in_the_targets_unit(tmp_path: Path) -> None:
    X, y = prices()
    result = tune(linear(), (X, y), tmp_path / "run", export="onnx")
    assert result.target_scale is not None
    assert result.target_scale.std[0] == pytest.approx(80_000, rel=0.3)
    assert any("targets scaled for training: (y - " in note for note in result.notes)
    assert result.metrics["val_r2"] > 0.95
    assert result.metrics["val_rmse"] < 20_000
    assert result.metrics["val_loss"] == pytest.approx(result.metrics["val_rmse"] ** 2, rel=1e-9)
    last = result.history[-1]
    assert last["train_loss"] == pytest.approx(last["val_loss"], rel=1)
    values = np.array([row["value"] for row in result.predict(X)])
    assert np.corrcoef(values, y)[0, 1] > 0.97
    mean, std = result.target_scale.mean[0], result.target_scale.std[0]
    own = result.model(X).detach().double().flatten().numpy() * std + mean
    np.testing.assert_allclose(values, own, rtol=1e-5)
    rmse = float(np.sqrt(((values - y.numpy()) ** 2).mean()))
    for model in (result, result.onnx):
        assert pyft.evaluate(model, (X, y))["rmse"] == pytest.approx(rmse, rel=1e-4)
    np.testing.assert_allclose([row["value"] for row in pyft.predict(result.onnx, X)], values, rtol=1e-6, atol=0.1)
    stored = json.loads((tmp_path / "run" / "target_scale.json").read_text())
    assert TargetScale.from_dict(stored) == result.target_scale


def test_the_scale_is_that_of_the_training_targets(tmp_path: Path) -> None:
    X, y = prices(60)
    result = tune(linear(), {"train": (X, y), "val": (X[:9], y[:9] * 100)}, tmp_path / "run", epochs=1)
    assert result.target_scale == TargetScale.of(y)


def test_two_targets_of_different_size(tmp_path: Path) -> None:
    X, y = prices(outputs=2)
    result = tune(linear(2), (X, y), tmp_path / "run", export="onnx", epochs=20)
    assert result.target_scale is not None
    assert len(result.target_scale.std) == 2
    assert result.metrics["val_r2"] > 0.95
    values = np.stack([row["value"] for row in result.predict(X)])
    assert np.abs(values - y.numpy())[:, 1].max() < 2e-3
    np.testing.assert_allclose(np.stack([row["value"] for row in pyft.predict(result.onnx, X)]), values, rtol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "mean", "std", "scaled"),
    [
        ("auto", 0, 1, False), ("auto", 9, 9, False), ("auto", 11, 1, True), ("auto", -11, 1, True),
        ("auto", 0, 11, True), ("auto", 0, 0.05, True), (True, 0, 1, True), (False, 500, 1, False),
    ],
)  # fmt: skip
def test_when_targets_are_scaled(wanted: Any, mean: float, std: float, scaled: bool) -> None:
    y = mean + std * torch.tensor([-1.0, 1.0]).repeat(32)
    scale, note = choose_scale(wanted, y, lambda: torch.zeros(64, 1), earlier=None, continues=False)
    assert (scale is not None, note is not None) == (scaled, scaled)


def test_a_model_that_gives_the_targets_already_is_left_as_it_is(tmp_path: Path) -> None:
    X, y = prices(100)
    model = nn.Sequential(nn.Linear(4, 1))
    solved = torch.linalg.lstsq(torch.cat([X, torch.ones(100, 1)], 1), y).solution
    model[0].weight.data, model[0].bias.data = solved[None, :4].clone(), solved[4:].clone()
    result = tune(model, (X, y), tmp_path / "run", epochs=1, lr=1e-3)
    assert result.target_scale is None
    assert any("gives values in their unit already" in note for note in result.notes)
    assert result.metrics["val_r2"] > 0.99
    assert not (tmp_path / "run" / "target_scale.json").exists()


def test_scale_targets_false_and_other_words(tmp_path: Path) -> None:
    X, y = prices(60)
    assert tune(linear(), (X, y), tmp_path / "run", epochs=1, scale_targets=False).target_scale is None
    for wrong in ("yes", 1, None):
        with pytest.raises(ConfigError, match=f"scale_targets={wrong!r}: expected 'auto', True or False"):
            tune(linear(), (X, y), tmp_path / "other", scale_targets=wrong)
    names = ["low" if value < 200_000 else "high" for value in y.tolist()]
    assert tune(linear(2), (X, names), tmp_path / "names", epochs=1, scale_targets=True).target_scale is None


def test_a_stopped_run_goes_on_with_its_scale(tmp_path: Path) -> None:
    X, y = prices(64)

    class Stops(nn.Sequential):
        left = 10**9

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.left -= self.training
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(x)

    def make(seed: int) -> Stops:
        return Stops(*linear(seed=seed))

    whole = tune(make(0), (X, y), tmp_path / "whole", epochs=3)
    stopped = make(0)
    stopped.left = 6
    with pytest.raises(KeyboardInterrupt):
        tune(stopped, (X, y), tmp_path / "run", epochs=3)
    stored = tmp_path / "run" / "target_scale.json"
    assert TargetScale.from_dict(json.loads(stored.read_text())) == whole.target_scale
    again = tune(make(7), (X, y), tmp_path / "run", epochs=3)
    assert again.target_scale == whole.target_scale
    assert again.metrics == whole.metrics
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_a_model_that_continues_a_run_keeps_its_scale() -> None:
    y, scale = torch.tensor([0.0, 1.0]), TargetScale((5.0,), (3.0,))
    asked: list[int] = []
    for wanted in ("auto", True):
        found = choose_scale(wanted, y, lambda: asked.append(1), earlier=scale, continues=True)[0]
        assert found == scale
    with pytest.raises(ConfigError, match="scale_targets=False: the earlier run's model gives scaled values"):
        choose_scale(False, y, lambda: asked.append(1), earlier=scale, continues=True)
    # An earlier run in the targets' own unit; and one with another head.
    assert choose_scale("auto", y * 1e6, lambda: asked.append(1), earlier=None, continues=True) == (None, None)
    made = choose_scale("auto", y * 1e6, lambda: torch.zeros(2), earlier=scale, continues=False)[0]
    assert made == TargetScale.of(y * 1e6)
    assert not asked


def test_the_run_folder_gives_the_same_values(tmp_path: Path) -> None:
    X, y = prices(64)
    model = linear()
    result = tune(model, (X, y), tmp_path / "run", epochs=2)
    opened = open_run(tmp_path / "run", copy.deepcopy(linear(seed=3)))
    assert opened.target_scale == result.target_scale
    values = opened.target_scale.unscale(opened.module(X)).flatten()
    np.testing.assert_array_equal(values.detach(), [row["value"] for row in result.predict(X)])
