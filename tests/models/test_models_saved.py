"""Weights in safetensors files, ties included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pyft.errors import CheckpointError, ConfigError
from pyft.models import saved
from pyft.models.saved import load_state, save_model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embedding.weight


def test_round_trip_with_ties_buffers_and_odd_dtypes(tmp_path: Path) -> None:
    model = Tied()
    model.register_buffer("short", torch.randn(3).to(torch.bfloat16))
    model.register_buffer("odd", torch.tensor([float("nan"), -0.0]))
    save_model(tmp_path / "m.safetensors", model)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert "decoder.weight" not in file.keys()  # noqa: SIM118
        assert json.loads(file.metadata()["pyft.tied"]) == {"embedding.weight": ["decoder.weight"]}
    other = Tied()
    other.register_buffer("short", torch.zeros(3, dtype=torch.bfloat16))
    other.register_buffer("odd", torch.zeros(2))
    parameters = [id(p) for p in other.parameters()]
    load_state(tmp_path / "m.safetensors", other)
    assert [id(p) for p in other.parameters()] == parameters
    assert other.decoder.weight is other.embedding.weight
    for name, tensor in model.state_dict().items():
        came = other.state_dict()[name]
        assert torch.equal(came.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_views_of_one_storage_and_other_memory_formats(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            storage = torch.arange(24.0)
            self.register_buffer("a", storage[:8])
            self.register_buffer("b", storage[4:12].view(2, 4).t())
            self.register_buffer("c", storage.view(1, 4, 2, 3).contiguous(memory_format=torch.channels_last))
            self.register_buffer("same", storage[:8])

    save_model(tmp_path / "v.safetensors", Views())
    other = Views()
    for buffer in other.buffers():
        buffer.data = torch.zeros_like(buffer)
    load_state(tmp_path / "v.safetensors", other)
    for name, tensor in Views().state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 5), r"'weight' has shape \(4, 3\) in the file, \(5, 3\) in the model"),
        (nn.Sequential(nn.Linear(3, 4)), r"'0\.weight' is missing in the file"),
        (nn.Linear(3, 4, bias=False), "the file has 'bias', which the model lacks"),
    ],
)
def test_weights_of_another_model(tmp_path: Path, model: nn.Module, message: str) -> None:
    save_model(tmp_path / "m.safetensors", nn.Linear(3, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_state(tmp_path / "m.safetensors", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path / "none.safetensors", nn.Linear(1, 1))
    path = save_model(tmp_path / "m.safetensors", nn.Linear(30, 40))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(path, nn.Linear(30, 40))


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path / "m.safetensors", nn.Linear(3, 4))
    before = path.read_bytes()

    def full(path: Any, write: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "write_atomic", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_model(path, nn.Linear(3, 4))
    assert path.read_bytes() == before


def test_extra_state_and_lazy_parameters_are_refused(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    with pytest.raises(ConfigError, match="extra state"):
        save_model(tmp_path / "m.safetensors", Extra())
    with pytest.raises(ConfigError, match="no values yet"):
        save_model(tmp_path / "m.safetensors", nn.LazyLinear(3))


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    """In two processes, whose hash seeds differ."""
    code = (
        "import sys, torch; from pyft.models.saved import save_model\n"
        "torch.manual_seed(0); model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))\n"
        "model[1].weight = model[0].weight if sys.argv[2] == 'tied' else model[1].weight\n"
        "save_model(sys.argv[1], model)"
    )
    for kind in ("tied", "plain"):
        files = [tmp_path / f"{kind}{i}.safetensors" for i in range(2)]
        for file in files:
            subprocess.run([sys.executable, "-c", code, str(file), kind], check=True)
        assert files[0].read_bytes() == files[1].read_bytes()
