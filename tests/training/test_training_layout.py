"""Channels last: chosen where it is faster and safe, and gone again afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyft
from pyft.training import layout
from pyft.training.layout import channels_last, choose_layout, convolution_weights

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two convolutions, BatchNorm, dropout; `flat` says how the rest is reached."""

    def __init__(self, flat: str = "flatten") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat = flat
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.1)
        )
        self.head = nn.Linear(8 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        if self.flat == "view":
            x = x.view(len(x), -1)
        elif self.flat == "storage":
            x = x.as_strided((len(x), 288), (288, 1))
        return self.head(x.flatten(1))


def state(model: nn.Module) -> list[Any]:
    weights = [(p.clone(), p.stride(), p.grad) for p in model.parameters()]
    return [weights, [b.clone() for b in model.buffers()], [m.training for m in model.modules()], torch.get_rng_state()]


def assert_untouched(model: nn.Module, before: list[Any]) -> None:
    weights, buffers, modes, generator = before
    for parameter, (values, strides, grad) in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, values)
        assert parameter.stride() == strides
        assert parameter.grad is grad
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


def use_and_fail(model: nn.Module) -> None:
    with channels_last(model):
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
        assert model.body(torch.zeros(2, 3, 6, 6)).is_contiguous(memory_format=torch.channels_last)
        raise KeyError


def test_only_inside() -> None:
    model = Net().eval()
    alias = model.body[0].weight.detach()
    identities, before = [id(p) for p in model.parameters()], state(model)
    with pytest.raises(KeyError):
        use_and_fail(model)
    assert_untouched(model, before)
    assert [id(p) for p in model.parameters()] == identities
    with channels_last(model, wanted=False):
        assert_untouched(model, before)
    with channels_last(model), torch.no_grad():
        model.body[0].weight += 1
    assert torch.equal(alias, before[0][0][0] + 1)
    assert alias.data_ptr() == model.body[0].weight.data_ptr()


def test_a_layout_of_the_user_s_choice_stays() -> None:
    model = Net().to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    assert convolution_weights(model) == []
    assert choose_layout(model, lambda: model(torch.randn(2, 3, 6, 6)), CPU, 100) == (False, None)
    with channels_last(model):
        pass
    assert [p.stride() for p in model.parameters()] == strides
    assert choose_layout(nn.Linear(2, 2), lambda: torch.zeros(1), CPU, 100) == (False, None)


@pytest.mark.parametrize(("flat", "safe"), [("flatten", True), ("view", False), ("storage", False)])
@pytest.mark.parametrize("times", [(3.0, 1.0), (1.0, 1.0), (1.05, 1.0)])
def test_the_faster_one_where_it_is_safe(
    flat: str, safe: bool, times: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net(flat)
    x = torch.randn(4, 3, 6, 6)
    before = state(model)
    timed = layout._time_both

    def time_both(*arguments: Any) -> tuple[float, float]:
        assert all(0 < seconds < 60 for seconds in timed(*arguments))
        return times

    monkeypatch.setattr(layout, "_time_both", time_both)
    wanted, reason = choose_layout(model, lambda: model(x), CPU, 1000)
    assert wanted == (safe and times[0] > 2)
    assert (reason is not None) == wanted
    assert_untouched(model, before)


def test_a_frozen_model_keeps_its_layout() -> None:
    model = Net().requires_grad_(False)
    assert choose_layout(model, lambda: model(torch.randn(2, 3, 6, 6)), CPU, 100) == (False, None)


def test_a_run_gives_contiguous_weights_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(120, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 3
    x += y.view(-1, 1, 1, 1)
    seen: list[bool] = []
    results = []
    for wanted in (False, True):
        reason = (wanted, "channels last: faster" if wanted else None)
        monkeypatch.setattr("pyft.job.choose_memory_layout", lambda *_, reason=reason: reason)
        model = Net()
        model.body[0].register_forward_pre_hook(
            lambda module, _: seen.append(not module.weight.is_contiguous()) if module.training else None
        )
        result = pyft.finetune(
            model, (x, y), out=tmp_path / str(wanted), strategy="full", epochs=3, lr=1e-2, precision="fp32",
            progress=False, export="onnx",
        )  # fmt: skip
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        assert json.loads((result.run_dir / "config.json").read_text())["channels_last"] is wanted
        assert any("channels last" in note for note in result.notes) == wanted
        assert result.parity is not None
        assert result.parity["passed"]
        results.append(result)
    assert set(seen[: len(seen) // 2]) == {False}
    assert set(seen[len(seen) // 2 :]) == {True}
    plain, last = (result.metrics["val_loss"] for result in results)
    assert last == pytest.approx(plain, rel=0.05)


def test_a_stopped_run_goes_on_with_the_layout_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(96, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 3
    options = {"strategy": "full", "epochs": 4, "lr": 1e-2, "precision": "fp32", "progress": False, "export": None}
    monkeypatch.setattr("pyft.job.choose_memory_layout", lambda *_: (True, "channels last: faster"))
    whole = pyft.finetune(Net(), (x, y), out=tmp_path / "whole", **options)

    model, steps = Net(), 0

    def stop(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt

    handle = model.body[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        pyft.finetune(model, (x, y), out=tmp_path / "stopped", **options)
    handle.remove()
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    monkeypatch.setattr("pyft.job.choose_memory_layout", lambda *_: (False, None))
    again = Net()
    pyft.finetune(again, (x, y), out=tmp_path / "stopped", **options)
    for a, b in zip(whole.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
