"""Steps look at state that somebody may have changed, and only at that: whoever changes it is heard."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyft

STEPS = 3


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5,), (3, 4), (600,))]


def advance(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], seed: int, keep: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if keep and param.grad is not None:
            param.grad.copy_(grad)
        else:
            param.grad = grad
    optimizer.step()


def halved(value: torch.Tensor) -> torch.Tensor:
    return value * 0.5


def move_data(state: Any, param: torch.nn.Parameter) -> None:
    state[param]["exp_avg"].data = halved(state[param]["exp_avg"])


def replace(state: Any, param: torch.nn.Parameter) -> None:
    state[param]["exp_avg"] = halved(state[param]["exp_avg"])


def set_storage(state: Any, param: torch.nn.Parameter) -> None:
    other = halved(state[param]["exp_avg"])
    state[param]["exp_avg"].set_(other.untyped_storage(), 0, other.shape, other.stride())


def count_on(state: Any, param: torch.nn.Parameter) -> None:
    state[param]["step"] = state[param]["step"] + 5


@pytest.mark.parametrize("keep", [False, True], ids=["new gradients", "same gradients"])
@pytest.mark.parametrize("change", [move_data, replace, set_storage, count_on])
@pytest.mark.parametrize("when", ["after steps", "before the first", "through a part"])
def test_changed_state_is_seen(change: Callable[..., None], when: str, keep: bool) -> None:
    """The same change and steps as with torch's AdamW give the same parameters."""
    results = []
    for make in (pyft.optim.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer: Any = make(params, lr=1e-2)
        held = optimizer.state if when == "before the first" else None
        for seed in range(STEPS):
            advance(optimizer, params, seed, keep)
        if when == "through a part":
            part = optimizer.state[params[2]]
            for seed in range(STEPS):
                advance(optimizer, params, seed, keep)
            held = {params[2]: part}
        change(optimizer.state if held is None else held, params[2])
        for seed in range(STEPS):
            advance(optimizer, params, seed, keep)
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deep", "shallow", "pickle"]
)
def test_copies_of_an_optimizer_see_each_other(copied: Callable[..., Any]) -> None:
    """A shallow copy shares the state: what one replaces is the other's, too."""
    params = parameters()
    first = pyft.optim.AdamW(params, lr=1e-2)
    for seed in range(STEPS):
        advance(first, params, seed)
    # Not before: it would count as asked for.
    of_first = first.state
    second = copied(first)
    advance(second, second.param_groups[0]["params"], STEPS)
    for param in params:
        of_first[param]["exp_avg"].data = torch.zeros_like(param)
    expected = {}
    for param, twin in zip(params, second.param_groups[0]["params"], strict=True):
        shared = copied is copy.copy
        expected[twin] = torch.zeros_like(param) if shared else second._own_state[twin]["exp_avg"].clone()
    advance(second, list(expected), STEPS)
    for twin, before in expected.items():
        torch.testing.assert_close(second._own_state[twin]["exp_avg"], 0.9 * before + 0.1 * twin.grad)
    of_second = second.param_groups[0]["params"]
    for param in of_second:
        second.state[param]["exp_avg"].data = torch.zeros_like(param)
        second.state[param]["exp_avg_sq"].data = torch.ones_like(param)
    advance(second, of_second, STEPS)
    for param in of_second:
        expected = 0.1 * param.grad
        torch.testing.assert_close(second.state[param]["exp_avg"], expected)
    before = {param: first.state[param]["exp_avg"].clone() for param in params}
    advance(first, params, STEPS + 1)
    for param in params:
        torch.testing.assert_close(first.state[param]["exp_avg"], 0.9 * before[param] + 0.1 * param.grad)


class Wrapper:
    """Takes over what an optimizer has, as Lightning's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})  # type: ignore[assignment]
        self.__dict__ = dict(optimizer.__dict__)


def test_state_asked_for_through_a_wrapper() -> None:
    params = parameters()
    optimizer = pyft.optim.AdamW(params, lr=1e-2)
    wrapper: Any = Wrapper(optimizer)
    for seed in range(STEPS):
        advance(optimizer, params, seed)
    for param in params:
        wrapper.state[param]["exp_avg"].data = torch.zeros_like(param)
    advance(optimizer, params, STEPS)
    for param in params:
        torch.testing.assert_close(wrapper.state[param]["exp_avg"], 0.1 * param.grad)


def test_a_loaded_state_is_the_optimizers_own() -> None:
    """What the user keeps of a state_dict can be changed without the optimizer hearing of it, and without harm."""
    params = parameters()
    optimizer = pyft.optim.AdamW(params, lr=1e-2)
    advance(optimizer, params, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for of_one in saved["state"].values():
        for value in of_one.values():
            value.fill_(float("nan"))
    advance(optimizer, params, 1)
    advance(optimizer, params, 2)
    assert all(bool(param.isfinite().all()) for param in params)


class Tagged(torch.Tensor):
    """A tensor class of somebody's."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_any_class_and_layout(dtype: torch.dtype) -> None:
    """A subclass, a view with other strides, and a plain gradient, changing places from step to step."""
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = pyft.optim.SGD(ours, lr=0.25)
    judge = torch.optim.SGD(theirs, lr=0.25)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for number, (param, other) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            other.grad = grad.clone()
            kind = (step + number) % 3
            if kind == 1:
                grad = grad.as_subclass(Tagged)  # type: ignore[arg-type]
            elif kind == 2:
                grad = torch.stack([grad, grad], dim=-1)[..., 0]
            param.grad = grad
        optimizer.step()
        judge.step()
        for param, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=2e-2 if dtype != torch.float32 else 1e-6)
