"""bf16 is taken where it pays, and finding that out changes nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.freezing.no_trace import no_trace
from pyft.job import autocast
from pyft.training import precision
from pyft.training.precision import bf16_hardware, choose_precision

CPU = torch.device("cpu")


def probe(fp32: float, bf16: float) -> object:
    seconds = {"fp32": fp32, "bf16": bf16}
    return lambda name: time.sleep(seconds[name])


def test_auto_takes_bf16_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_hardware", lambda device: "AMX")
    chosen, reason = choose_precision("auto", CPU, probe(0.02, 0.005))  # type: ignore[arg-type]
    assert chosen == "bf16"
    assert reason is not None
    assert "AMX" in reason
    assert choose_precision("auto", CPU, probe(0.005, 0.02))[0] == "fp32"  # type: ignore[arg-type]
    # 5 % faster is not worth the digits.

    monkeypatch.setattr(precision, "_time_both", lambda *args: (1.0, 0.95))
    assert choose_precision("auto", CPU, lambda name: None)[0] == "fp32"
    monkeypatch.setattr(precision, "_time_both", lambda *args: (1.0, 0.9))
    assert choose_precision("auto", CPU, lambda name: None)[0] == "bf16"


def test_auto_does_not_probe_without_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_hardware", lambda device: None)
    chosen, reason = choose_precision("auto", CPU, lambda name: pytest.fail("probed"))
    assert chosen == "fp32"
    assert reason is not None
    assert "no bf16 units" in reason


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_hardware", lambda device: None)
    assert choose_precision("fp32", CPU) == ("fp32", None)
    chosen, reason = choose_precision("bf16", CPU)
    assert chosen == "bf16"
    assert reason is not None
    assert "emulated" in reason
    with pytest.raises(ConfigError, match="'fp16'"):
        choose_precision("fp16", CPU)


def test_hardware_is_that_of_the_cpu() -> None:
    if not Path("/proc/cpuinfo").is_file():
        pytest.skip("no /proc/cpuinfo")
    flags = Path("/proc/cpuinfo").read_text()
    assert (bf16_hardware(CPU) is not None) == ("avx512_bf16" in flags or "amx_tile" in flags)


def test_the_probe_of_a_long_run_may_take_longer() -> None:
    calls = {"fp32": 0, "bf16": 0}

    def count(name: str) -> None:
        calls[name] += 1
        time.sleep(0.002)

    precision._time_both(count, CPU, 1)
    short = dict(calls)
    precision._time_both(count, CPU, 100_000)
    assert short == {"fp32": 3, "bf16": 3}
    assert calls["bf16"] - short["bf16"] > 10


def test_a_probe_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].eval()
    model[3].weight.grad = torch.ones(2, 4)
    grad = model[3].weight.grad
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())
    random = torch.get_rng_state()
    with no_trace(model):
        model.train()
        model(torch.randn(8, 3)).sum().backward()
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert model[0].weight.grad is None
    assert model[3].weight.grad is grad
    assert torch.equal(grad, torch.ones(2, 4))


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_a_gpu_with_bf16_units_is_asked(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(precision, "_time_both", lambda *args: (1.0, 0.5))
    device = torch.device("cuda", 0)
    chosen, reason = choose_precision("auto", device, lambda name: None)
    assert chosen == expected
    assert reason is not None
    assert ("GPU" if expected == "bf16" else "this cuda has no bf16 units") in reason


def test_autocast_of_a_run_is_that_of_its_device() -> None:
    before = torch.is_autocast_enabled("cpu")
    with autocast(torch.device("cuda", 0), "bf16"):
        if torch.cuda.is_available():
            assert torch.is_autocast_enabled("cuda")
            assert torch.get_autocast_dtype("cuda") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu") == before
    with autocast(CPU, "bf16"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    with autocast(CPU, "fp32"):
        assert not torch.is_autocast_enabled("cpu")
