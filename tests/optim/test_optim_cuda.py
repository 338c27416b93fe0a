"""Optimizers on a real GPU against the same on the CPU; the emulated GPU has its own tests."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pyft.optim
from pyft.core.loader import load_cuda_core
from pyft.optim.device_plan import DevicePlan

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

CASES: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("AdamW", {}, torch.float32),
    ("AdamW", {"clip_norm": 0.5}, torch.float32),
    ("AdamW", {"clip_norm": 0.5, "weights": "split32"}, torch.bfloat16),
    ("AdamW", {"clip_norm": {"agc": 0.01, "global": 1.0}, "state_dtype": "int8"}, torch.float32),
    ("SGD", {"momentum": 0.9, "nesterov": True, "clip_value": 0.1}, torch.float32),
    ("RMSprop", {"centered": True, "state_dtype": "bfloat16"}, torch.float32),
    ("Adagrad", {"clip_norm": 0.1, "clip_mode": "tensor"}, torch.float32),
    ("Lion", {"weights": "stochastic"}, torch.bfloat16),
]


@pytest.fixture(autouse=True)
def cuda_core() -> Any:
    core = load_cuda_core()
    assert core is not None, "there is a GPU, but no CUDA core: see pyft doctor"
    return core


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def models(dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 20), (7,), (4, 3, 3, 3), (0,), (), (257,), (5000, 3)]
    on_cpu = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return on_cpu, [torch.nn.Parameter(param.detach().cuda()) for param in on_cpu]


def give_gradients(*models: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*models, strict=True):
        grad = torch.randn(same[0].shape, generator=generator)
        for param in same:
            param.grad = grad.to(param.device, param.dtype)


@pytest.mark.parametrize(("name", "options", "dtype"), CASES)
def test_has_the_bits_of_the_cpu(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    on_cpu, on_gpu = models(dtype)
    ours, theirs = (getattr(pyft.optim, name)(params, lr=1e-2, **options) for params in (on_cpu, on_gpu))
    for step in range(5):
        give_gradients(on_cpu, on_gpu, seed=step)
        ours.step()
        theirs.step()
    assert isinstance(theirs._plan, DevicePlan)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(a, b.cpu())
    if ours.last_step.total_norm is not None:
        assert theirs.last_step.total_norm == pytest.approx(ours.last_step.total_norm, rel=1e-13)


def test_nothing_waits() -> None:
    _, params = models(torch.float32)
    optimizer = pyft.optim.AdamW(params, clip_norm=1.0)
    with waiting_is_an_error():
        take_steps(params, optimizer)
    assert optimizer.last_step.total_norm > 0


def take_steps(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        for param in params:
            param.grad = torch.full_like(param, float(step))
        optimizer.step()


@pytest.mark.parametrize("count", [1, 2000])
@pytest.mark.parametrize(("options", "most"), [({}, 1), ({"clip_norm": 1.0}, 3)])
def test_launches_of_a_step(options: dict[str, Any], most: int, count: int) -> None:
    params = [torch.nn.Parameter(torch.ones(512, device="cuda")) for _ in range(count)]
    optimizer = pyft.optim.AdamW(params, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in names if not name.startswith(("Memcpy", "Memset"))]) == most, names


def test_a_captured_step_is_a_step() -> None:
    on_gpu, captured = (models(torch.float32)[1] for _ in range(2))
    plain, graphed = (pyft.optim.AdamW(params, clip_norm=1.0) for params in (on_gpu, captured))
    give_gradients(on_gpu, captured, seed=0)
    for _ in range(2):
        plain.step()
        graphed.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for _ in range(3):
        graph.replay()
        plain.step()
    assert float(graphed.state[captured[0]]["step"]) == 5.0
    assert all(torch.equal(a, b) for a, b in zip(on_gpu, captured, strict=True))


def test_replays_take_the_numbers_of_the_last_refresh() -> None:
    on_gpu, captured = (models(torch.float32)[1] for _ in range(2))
    plain, graphed = (pyft.optim.AdamW(params, lr=0.1, clip_norm=1.0) for params in (on_gpu, captured))
    give_gradients(on_gpu, captured, seed=0)
    plain.step()
    graphed.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    graph.replay()
    plain.step()
    for weight_decay in (0.5, 0.1):
        for optimizer in (plain, graphed):
            optimizer.param_groups[0].update(lr=0.01, betas=(0.5, 0.8), weight_decay=weight_decay)
        graphed.refresh_graph()
        graph.replay()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(on_gpu, captured, strict=True))


@pytest.mark.parametrize("capturable", [False, True])
def test_state_goes_to_torch_and_back(capturable: bool) -> None:
    ours, theirs = (models(torch.float32)[1] for _ in range(2))
    mine = pyft.optim.AdamW(ours, lr=1e-2)
    torchs = torch.optim.AdamW(theirs, lr=1e-2, capturable=capturable)
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        mine.step()
        torchs.step()
    mine_state, torch_state = copy.deepcopy(mine.state_dict()), copy.deepcopy(torchs.state_dict())
    mine.load_state_dict(torch_state)
    torchs.load_state_dict(mine_state)
    assert mine.state[ours[0]]["step"].is_cuda
    for step in range(3, 6):
        give_gradients(ours, theirs, seed=step)
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_the_core_the_reference_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyft.optim.device_plan.load_cuda_core", lambda: None)
    monkeypatch.setattr("pyft.optim.state.load_cuda_core", lambda: None)
    on_cpu, on_gpu = models(torch.float32)
    ours, theirs = (pyft.optim.AdamW(params, clip_norm=1.0) for params in (on_cpu, on_gpu))
    give_gradients(on_cpu, on_gpu, seed=0)
    ours.step()
    theirs.step()
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6)
