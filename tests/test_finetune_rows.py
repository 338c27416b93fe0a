"""A tuning whose weights train in part: selection, resume to the same bits, plain weights at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pyft
from pyft.training.steps import Stepper

ROWS = {"0.weight": pyft.Rows(0.25), "0.bias": True, "1": pyft.Rows(count=3, by="magnitude"), "3.weight": [0, 2]}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def tune(out: Path, **options: Any) -> tuple[pyft.Result, nn.Module]:
    y = torch.arange(240) % 3
    x = torch.randn(240, 6, generator=torch.Generator().manual_seed(0)) + y.view(-1, 1)
    net = model()
    options = {"strategy": "full", "freeze": ROWS, "export": None, "head": None, **options}
    result = pyft.finetune(
        net, (x, y), out=out, epochs=4, batch_size=16, lr=1e-2, precision="fp32", progress=False, **options
    )
    return result, net


def test_only_the_rows_have_moved_and_the_model_is_plain(tmp_path: Path) -> None:
    result, net = tune(tmp_path / "run", export="onnx")
    before, after = model().state_dict(), net.state_dict()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert set(saved) == set(before)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in model().named_parameters()]
    assert all(type(module) is type(other) for module, other in zip(net.modules(), model().modules(), strict=True))
    assert sorted(result.plan.parts) == ["0.weight", "1.bias", "1.weight", "3.weight"]
    for name, chosen in result.plan.parts.items():
        assert torch.equal(chosen.entries.rest(after[name]), chosen.entries.rest(before[name])), name
        assert not torch.equal(after[name], before[name]), name
        assert torch.equal(saved[name], after[name])
    assert torch.equal(after["0.bias"], before["0.bias"])
    assert not torch.equal(after["3.bias"], before["3.bias"])
    assert "4 of 16 rows, largest gradient over 8 batches" in str(result.plan)
    assert result.plan.num_trainable == 4 * 6 + 3 + 3 + 2 * 16 + 3
    assert result.metrics["val_accuracy"] > 0.5
    delta = pyft.save_delta(net, tmp_path / "delta.safetensors", result.plan)
    shipped = model()
    pyft.apply_delta(shipped, delta)
    assert all(torch.equal(value, after[name]) for name, value in shipped.state_dict().items())


@pytest.mark.parametrize("at", [2, 17, 40])
@pytest.mark.parametrize("strategy", ["full", "stages"])
def test_a_run_that_died_goes_on_to_the_same_bits(
    at: int, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strategy == "stages":
        stages = [
            pyft.Stage("rows", ROWS, 2),
            pyft.Stage("others", {"0.weight": pyft.Rows(0.5, by="fisher"), "3": True}, 2),
        ]
        options: dict[str, Any] = {"strategy": stages, "freeze": None}
    else:
        options = {}
    whole, net = tune(tmp_path / "whole", **options)
    step, count = Stepper.step, 0

    def dies(self: Stepper, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise SystemExit("killed")
        step(self, *arguments)

    monkeypatch.setattr(Stepper, "step", dies)
    with pytest.raises(SystemExit):
        tune(tmp_path / "run", **options)
    monkeypatch.setattr(Stepper, "step", step)
    resumed, again = tune(tmp_path / "run", **options)
    assert resumed.history[-1]["val_loss"] == whole.history[-1]["val_loss"]
    wanted = net.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())


def test_the_head_stage_of_gradual_with_rows(tmp_path: Path) -> None:
    result, _ = tune(tmp_path / "run", strategy="gradual", head="3", freeze={"0.weight": pyft.Rows(0.25)})
    assert {row["stage"] for row in result.history} == {"head", "full"}
