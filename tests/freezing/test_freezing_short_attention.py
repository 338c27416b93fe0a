"""`F.scaled_dot_product_attention` of short sequences by the core: where it acts, and what torch gives there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pyft.freezing.lean import short_attention as module
from pyft.freezing.lean.calls import lean_calls
from pyft.freezing.lean.core_calls import core_calls
from pyft.freezing.prefix_cache import PrefixCache
from pyft.freezing.saved_bytes import saved_bytes

SIZES = (8, 4, 24, 32)


@pytest.fixture
def calls(core: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that the core took."""
    seen: list[tuple[int, ...]] = []
    own = module.short_attention
    monkeypatch.setattr(module, "short_attention", lambda q, *rest: seen.append(tuple(q.shape)) or own(q, *rest))
    return seen


def operands(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, rows, width = sizes or SIZES
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(batch, rows, heads, width, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]


def results(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and gradients; of the same draws in each call."""
    torch.manual_seed(5)
    out = F.scaled_dot_product_attention(*inputs, **options)
    grads = torch.autograd.grad(out, inputs, torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return [out.detach(), *grads, torch.rand(2)]


CASES: list[dict[str, Any]] = [
    {},
    {"attn_mask": torch.arange(24) < torch.arange(17, 25).view(8, 1, 1, 1)},
    {"attn_mask": torch.randn(24, 24, generator=torch.Generator().manual_seed(2))},
    {"is_causal": True},
    {"scale": 0.7},
    {"dropout_p": 0.1},
    {"dropout_p": 0.5, "is_causal": True},
    {"dropout_p": 0.2, "attn_mask": torch.rand(8, 4, 24, 24, generator=torch.Generator().manual_seed(2)) > 0.3},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("context", [core_calls, lean_calls])
def test_as_torch_with_its_draws(calls: list[Any], options: dict[str, Any], context: Any) -> None:
    inputs = operands()
    with context():
        found = results(inputs, **options)
    assert calls == [SIZES]
    for a, b in zip(found, results(inputs, **options), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 2e-6 * (1.0 + b.abs().max())
    # The generator is where torch's is.
    assert torch.equal(found[-1], results(inputs, **options)[-1])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_keeps_less_than_torch(core: Any, p: float) -> None:
    inputs = operands()
    batch, heads, rows, _ = SIZES
    bits, sums = batch * heads * rows * rows // 8, batch * heads * rows * 4

    def run() -> Tensor:
        return F.scaled_dot_product_attention(*inputs, dropout_p=p)

    with core_calls():
        few = saved_bytes(run, torch.nn.ParameterList(inputs))
    assert few == sums + bool(p) * bits
    assert saved_bytes(run, torch.nn.ParameterList(inputs)) > 4 * few


@pytest.mark.parametrize("grad", [True, False])
def test_without_gradient(calls: list[Any], grad: bool) -> None:
    q, k, v = (x.detach() for x in operands())
    with torch.inference_mode(not grad), core_calls():
        found = F.scaled_dot_product_attention(q, k, v)
    assert calls
    assert found.grad_fn is None
    assert (found - F.scaled_dot_product_attention(q, k, v)).abs().max() < 2e-6


LEFT_ALONE: dict[str, Any] = {
    "double": lambda q, k, v: (q.double(), k.double(), v.double()),
    "narrow heads": lambda q, k, v: (q[..., :24], k[..., :24], v[..., :24]),
    "three dimensions": lambda q, k, v: (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)),
    "another width of values": lambda q, k, v: (q, k, v[..., :16]),
    "broadcast heads": lambda q, k, v: (q, k[:, :1], v[:, :1]),
    "little to do": lambda q, k, v: (q[:1], k[:1], v[:1]),
    "one query": lambda q, k, v: (q[:, :, :1], k, v),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_to_torch(calls: list[Any], case: str) -> None:
    inputs = LEFT_ALONE[case](*(x.detach() for x in operands(16, 8, 24, 32)))
    wanted = F.scaled_dot_product_attention(*inputs)
    with core_calls():
        assert torch.equal(F.scaled_dot_product_attention(*inputs), wanted)
    assert not calls


def test_what_else_is_left_to_torch(calls: list[Any]) -> None:
    q, k, v = operands()
    learned = torch.zeros(24, 24, requires_grad=True)
    with core_calls():
        results([q, k, v], attn_mask=learned)
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(q, k, v)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.scaled_dot_product_attention(q, k, v)
        checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False).sum().backward()
        with pytest.raises(RuntimeError, match="must match"):
            F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(7, 24))
        torch.func.vmap(F.scaled_dot_product_attention)(q[None], k[None], v[None])
    F.scaled_dot_product_attention(q, k, v)
    assert not calls
    assert learned.requires_grad


def test_compiled_code_has_torchs(calls: list[Any]) -> None:
    q, k, v = (x.detach() for x in operands())
    with core_calls():
        compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager")(q, k, v)
    assert (compiled - F.scaled_dot_product_attention(q, k, v)).abs().max() < 2e-6
    assert not calls


def test_a_second_derivative_is_refused(calls: list[Any]) -> None:
    inputs = operands()
    with core_calls():
        out = F.scaled_dot_product_attention(*inputs)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


class Attending(torch.nn.Module):
    """One layer of attention with projections, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(64, 3 * 64)
        self.head = torch.nn.Linear(64, 2)
        self.attend = _Attend()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(self.body(x)).mean(1))


class _Attend(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_fill_takes_it(calls: list[Any]) -> None:
    torch.manual_seed(0)
    model = Attending()
    model.body.requires_grad_(False)
    x = torch.randn(32, 20, 64)
    cache = PrefixCache(model, x[:4], storage="ram")
    cache.fill([(range(32), x)])
    assert calls == [(32, 4, 20, 16)]
    q, k, v = model.body.double()(x.double()).view(32, 20, 3, 4, 16).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(16)).softmax(-1)
    wanted = (weights @ v).transpose(1, 2).flatten(2)
    model.float()
    stored = cache.values(range(32))
    assert (stored - (wanted if stored.ndim == 3 else wanted.mean(1))).abs().max() < 1e-5
