"""Deltas: what they hold, that they fit one model only, and that damage is told before anything is written."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import pyft
from pyft.errors import CheckpointError, ConfigError


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(32, 64))


def tuned() -> tuple[nn.Module, pyft.FreezePlan]:
    model = net()
    plan = pyft.freeze(
        model, {"0.weight": [1, 5], "0.bias": True, "3.weight": {"blocks": [(0, 1), (3, 3)], "block_size": (8, 8)}}
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 4, 6)).square().mean().backward()
        optimizer.step()
    return model, plan


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("target", ["plain", "partly", "partly, other rows"])
def test_a_delta_makes_the_tuned_model(tmp_path: Path, released: bool, target: str) -> None:
    model, plan = tuned()
    if released:
        plan.release(model)
    path = pyft.save_delta(model, tmp_path / "d.safetensors", plan if released else None)
    assert path.stat().st_size < 0.5 * sum(v.numel() * v.element_size() for v in model.state_dict().values())
    other = net()
    if target != "plain":
        pyft.train_only(other, "0.weight", rows=[1, 5] if target == "partly" else [0, 2])
    names = pyft.apply_delta(other, path)
    assert "0.weight" in names
    other(torch.randn(4, 4, 6)) if target == "plain" else other.eval()(torch.randn(4, 4, 6))
    wanted = model.state_dict()
    for name, value in other.state_dict().items():
        if not name.startswith("1.") or target != "plain":  # the forward pass above moved BatchNorm's statistics
            assert torch.equal(value, wanted[name]), name


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    model, _ = tuned()
    path = pyft.save_delta(model, tmp_path / "d.safetensors")

    def moved(name: str) -> nn.Module:
        other = net()
        with torch.no_grad():
            other.get_parameter(name).view(-1)[0] += 1e-6
        return other

    cases = [
        (net(1), "the frozen values of '0.weight' are not those"),
        (moved("0.weight"), "the frozen values of '0.weight' are not those"),
        (moved("0.bias"), "the frozen values of '0.bias' are not those"),
        (nn.Sequential(*net()[:3]), "it holds '3.weight', which the model lacks"),
        (nn.Sequential(*net(), nn.Linear(64, 1)), "the model has '4.weight', which the tuned one lacked"),
        (net().double(), "'0.weight' is torch.float64, there torch.float32"),
        (nn.Sequential(nn.Conv1d(4, 8, 5), *net()[1:]), r"'0.weight' has the shape \(8, 4, 5\)"),
    ]
    for other, message in cases:
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(CheckpointError, match=message):
            pyft.apply_delta(other, path)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_damaged_files_are_told(tmp_path: Path) -> None:
    model, _ = tuned()
    path = pyft.save_delta(model, tmp_path / "d.safetensors")
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match="no delta at"):
        pyft.apply_delta(net(), tmp_path / "none")
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        pyft.apply_delta(net(), path)
    from safetensors import safe_open
    from safetensors.torch import save_file

    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="holds no delta"):
        pyft.apply_delta(net(), path)
    save_file({**tensors, "rows:0.weight": torch.tensor([1, 800])}, path, header)
    with pytest.raises(CheckpointError, match=r"rows of '0.weight' are outside the weight"):
        pyft.apply_delta(net(), path)
    del tensors["value:0.weight"]
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match="damaged"):
        pyft.apply_delta(net(), path)


def test_nothing_trains_so_there_is_no_delta(tmp_path: Path) -> None:
    model = net().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing of this model trains"):
        pyft.save_delta(model, tmp_path / "d.safetensors")


def test_an_older_file_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tuned()
    path = pyft.save_delta(model, tmp_path / "d.safetensors")
    content = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        pyft.save_delta(model, path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"]
