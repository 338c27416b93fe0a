"""Steps in CUDA graphs, on the emulated GPU: a replay does the copies of the capture again, and launches the update."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyft.optim
from pyft.optim import captured, device_plan
from pyft.optim.device_plan import DevicePlan


@pytest.fixture(autouse=True)
def gpu(emulation: Any, plans_of_the_emulated_gpu: None) -> None:
    if emulation is None:
        pytest.skip("runs on the CUDA emulation: pytest --cuda-emulation=ascending")


class Copies(TorchDispatchMode):
    """The copies made meanwhile, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.pairs.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


class Graph:
    """What a CUDA graph of one step without norms holds: copies from the host's memory, and one launch."""

    def __init__(self, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with Copies() as copies, monkeypatch.context() as patch:
            for module in (device_plan, captured):
                patch.setattr(module, "is_capturing", lambda: True)
            optimizer.step()
        self.copies = copies.pairs
        self.core_plan = optimizer._plan.devices[0].core_plan

    def replay(self) -> None:
        for to, source in self.copies:
            to.copy_(source)
        self.core_plan.update([], 1, 0, [])


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (300,), (3,))]


def give_gradients(seed: int, *models: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*models, strict=True):
        grad = torch.randn(same[0].shape, generator=generator)
        for param in same:
            param.grad = grad.clone()


def expect_same(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


NUMBERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("AdamW", {"lr": 0.1}, {"lr": 0.02, "betas": (0.5, 0.6), "eps": 0.3, "weight_decay": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}, {"momentum": 0.3, "dampening": 0.5, "weight_decay": 0.9}),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9}, {"alpha": 0.2, "eps": 0.5, "weight_decay": 0.5}),
]


@pytest.mark.parametrize(("name", "options", "numbers"), NUMBERS)
def test_replays_take_the_numbers_of_the_last_refresh(
    name: str, options: dict[str, Any], numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = parameters(), parameters()
    mine, torchs = getattr(pyft.optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    give_gradients(1, ours, theirs)
    mine.step()
    graph = Graph(mine, monkeypatch)
    torchs.step()
    torchs.step()
    # The numbers of the groups alone change no replay.
    mine.param_groups[0].update(numbers)
    graph.replay()
    torchs.step()
    expect_same(ours, theirs)
    before = mine._plan.devices[0].core_plan.uploads()
    mine.refresh_graph()
    mine.refresh_graph()
    assert mine._plan.devices[0].core_plan.uploads() == before + 1
    torchs.param_groups[0].update(numbers)
    for _ in range(3):
        graph.replay()
        torchs.step()
    expect_same(ours, theirs)


def test_a_scheduler_reaches_replays_through_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = parameters(), parameters()
    both = [pyft.optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in both]
    give_gradients(1, ours, theirs)
    both[0].step()
    graph = Graph(both[0], monkeypatch)
    both[1].step()
    both[1].step()
    for _ in range(3):
        for scheduler in schedulers:
            scheduler.step()
        both[0].refresh_graph()
        graph.replay()
        both[1].step()
    expect_same(ours, theirs)


def test_replays_and_other_steps_have_their_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = parameters(), parameters()
    mine, torchs = pyft.optim.SGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    give_gradients(1, ours, theirs)
    of_graph = [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    mine.step()
    torchs.step()
    graph = Graph(mine, monkeypatch)
    torchs.step()
    for seed in (2, 3):
        give_gradients(seed, ours, theirs)
        mine.step()
        torchs.step()
        graph.replay()
        of_step = [b.grad for b in theirs]
        for param, (_, grad) in zip(theirs, of_graph, strict=True):
            param.grad = grad
        torchs.step()
        # The same gradients as in the last step, after a replay that had others.
        for param, grad in zip(theirs, of_step, strict=True):
            param.grad = grad
        mine.step()
        torchs.step()
    expect_same(ours, theirs)


def test_a_captured_plan_lives_as_long_as_its_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = pyft.optim.SGD(params, lr=0.1)
    give_gradients(1, params)
    optimizer.step()
    graph = Graph(optimizer, monkeypatch)
    kept, plan = params[2].grad, weakref.ref(optimizer._plan)
    params[2].grad = None
    optimizer.step()
    gc.collect()
    assert plan() is not None
    assert optimizer._plan is not plan()
    want = params[2].detach() - 0.1 * kept
    graph.replay()
    torch.testing.assert_close(params[2].detach(), want)
    del graph, optimizer
    gc.collect()
    assert plan() is None


def changed(optimizer: Any, **numbers: Any) -> None:
    optimizer.param_groups[0].update(numbers)


CHANGES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda one: setattr(one, "clip_norm", 1.0), "clipping has changed since the capture .*global.*capture the step"),
    (lambda one: changed(one, momentum=0.0), "rule of group 0 was 'sgd_momentum' .* is 'sgd'; .*capture the step"),
    (lambda one: one.add_param_group({"params": parameters(1)}), "there were 1 groups, now there are 2; .*capture"),
    (lambda one: changed(one, decay_to_init=0.5), "decay_to_init was 0 when the step was captured"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_what_is_part_of_the_graph_is_refused(
    change: Callable[[Any], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters()
    optimizer = pyft.optim.SGD(params, lr=0.1, momentum=0.9)
    give_gradients(1, params)
    optimizer.step()
    Graph(optimizer, monkeypatch)
    change(optimizer)
    with pytest.raises(RuntimeError, match=said):
        optimizer.refresh_graph()


def test_a_learning_rate_that_became_a_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = pyft.optim.SGD(params, lr=0.1)
    give_gradients(1, params)
    optimizer.step()
    Graph(optimizer, monkeypatch)
    monkeypatch.setattr("pyft.optim.step_plan.is_on_device", lambda value: isinstance(value, Tensor))
    changed(optimizer, lr=torch.tensor(0.2))
    with pytest.raises(RuntimeError, match="lr of group 0 is not what it was, a number or a tensor"):
        optimizer.refresh_graph()


def test_a_capture_that_copies_its_numbers_cannot_be_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = pyft.optim.SGD(params, lr=0.1)
    give_gradients(1, params)
    optimizer.step()
    changed(optimizer, lr=0.2)
    graph = Graph(optimizer, monkeypatch)
    before = [param.detach() - 0.2 * param.grad for param in params]
    graph.replay()
    assert all(torch.allclose(param, want) for param, want in zip(params, before, strict=True))
    changed(optimizer, lr=0.3)
    with pytest.raises(RuntimeError, match=r"brings its own hyperparameters .* take one with the same numbers"):
        optimizer.refresh_graph()


def test_a_refresh_needs_a_capture_and_none_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = pyft.optim.SGD(params, lr=0.1)
    give_gradients(1, params)
    optimizer.step()
    assert isinstance(optimizer._plan, DevicePlan)
    with pytest.raises(RuntimeError, match="no step of this optimizer on a GPU was captured"):
        optimizer.refresh_graph()
    Graph(optimizer, monkeypatch)
    monkeypatch.setattr(captured, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="between replays, and a CUDA graph is captured: call it outside"):
        optimizer.refresh_graph()
