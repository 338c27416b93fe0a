"""`F.linear` in batches with padding, and `F.gelu`, by the core: where it acts, and what torch gives there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyft.freezing.lean import fast_gelu, token_linear
from pyft.freezing.lean.core_calls import core_calls

LENGTHS = torch.tensor([24, 5, 9, 24])
MASK = torch.arange(24) < LENGTHS[:, None]


@pytest.fixture
def calls(core: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the core was called for. Products are the core's on every CPU here."""
    seen: list[str] = []

    def note(module: Any, name: str) -> None:
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: seen.append(name) or own(*args, **kwargs))

    for name in ("token_linear", "token_linear_backward"):
        note(token_linear, name)
    for name in ("gelu", "gelu_backward"):
        note(fast_gelu, name)
    monkeypatch.setattr(token_linear, "packing_pays", lambda: True)
    return seen


def hidden(width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(4, 24, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def mean_of_tokens(x: Tensor) -> Tensor:
    return (x * MASK[..., None]).sum(1) / LENGTHS[:, None]


def gradients(loss: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module) -> list[Tensor]:
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [loss(x).detach(), *torch.autograd.grad(loss(x), wanted)]


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_tokens_are_as_in_torch(calls: list[str], frozen: tuple[str, ...]) -> None:
    layer, x = nn.Linear(64, 70), hidden()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)

    def loss(x: Tensor) -> Tensor:
        return mean_of_tokens(layer(x)).square().sum()

    wanted = gradients(loss, x, layer)
    assert not calls
    with core_calls(MASK):
        out = layer(x)
        found = gradients(loss, x, layer)
    assert {"token_linear", "token_linear_backward"} == set(calls)
    assert torch.equal(out[~MASK], torch.zeros_like(out[~MASK]))
    assert torch.allclose(out[MASK], layer(x)[MASK], atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-5)
    assert torch.equal(found[1][~MASK], torch.zeros_like(found[1][~MASK]))


def test_padding_is_never_read(calls: list[str]) -> None:
    layer = nn.Linear(64, 70)
    x = hidden().detach()
    x[~MASK] = torch.nan
    with core_calls(MASK):
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("case", ["narrow", "other sizes", "float64", "two dimensions", "no padding", "functorch"])
def test_torch_does_the_rest(calls: list[str], case: str) -> None:
    layer, x, mask = nn.Linear(64, 70), hidden(), MASK
    if case == "narrow":
        layer = nn.Linear(64, 63)
    elif case == "other sizes":
        x = torch.randn(24, 4, 64)
    elif case == "float64":
        layer, x = layer.double(), x.double()
    elif case == "two dimensions":
        x = x.flatten(0, 1)
    elif case == "no padding":
        mask = torch.ones(4, 24)
    run = torch.vmap(layer) if case == "functorch" else layer
    wanted = run(x)
    with core_calls(mask):
        assert torch.equal(run(x), wanted)
    assert not calls


def test_autocast_and_checkpoints_are_torch_s(calls: list[str]) -> None:
    layer, x = nn.Linear(64, 70), hidden()
    with core_calls(MASK):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        checkpoint(lambda x: F.gelu(layer(x)), x, use_reentrant=False).sum().backward()
    assert not calls


def test_second_derivatives(calls: list[str]) -> None:
    layer, x = nn.Linear(64, 64).double(), hidden().double()
    small, y = nn.Linear(64, 64), hidden()
    small.load_state_dict(layer.state_dict())
    y.data.copy_(x.data)

    def penalty(layer: nn.Linear, x: Tensor) -> list[Tensor]:
        out = mean_of_tokens(F.gelu(layer(x))).square().sum()
        (dx,) = torch.autograd.grad(out, x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()]))

    wanted = penalty(layer, x)
    with core_calls(MASK):
        found = penalty(small, y)
    assert "token_linear" in calls
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-7, rtol=1e-3)


def test_gelu_is_that_of_torch(calls: list[str]) -> None:
    x = torch.randn(5000, requires_grad=True)
    grad = torch.randn(5000)
    (wanted,) = torch.autograd.grad(F.gelu(x), x, grad)
    with core_calls():
        y = nn.GELU()(x)
        (found,) = torch.autograd.grad(y, x, grad)
    assert calls == ["gelu", "gelu_backward"]
    assert torch.allclose(y, F.gelu(x), atol=2e-6)
    assert torch.allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("case", ["tanh", "few", "bfloat16", "strided"])
def test_other_gelus_are_torch_s(calls: list[str], case: str) -> None:
    x = torch.randn(100 if case == "few" else 5000)
    x = x.bfloat16() if case == "bfloat16" else torch.stack([x, x], 1)[:, 0] if case == "strided" else x
    kind = "tanh" if case == "tanh" else "none"
    wanted = F.gelu(x, approximate=kind)
    with core_calls():
        assert torch.equal(F.gelu(x, approximate=kind), wanted)
    assert not calls
