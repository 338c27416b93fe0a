"""Attention of short sequences against float64, on every CPU target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyft.ops.random_bits import bernoulli_bits
from pyft.ops.short_attention import (
    short_attention,
    short_attention_backward,
    short_attention_backward_reference,
    short_attention_reference,
)

INF = math.inf


def operands(batch: int, heads: int, queries: int, keys: int, width: int, *, gaps: int = 0) -> list[Tensor]:
    """Query, key, value, and a gradient, as projections give them: heads beside each other in memory."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    return [
        torch.randn(batch, rows, heads, width + gaps, generator=generator)[..., gaps:].transpose(1, 2)
        for rows in (queries, keys, keys, queries)
    ]


def mask_of(kind: str, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(batch + keys)
    if kind == "none":
        return None
    if kind == "padding":
        lengths = torch.randint(1, keys + 1, (batch, 1, 1, 1), generator=generator)
        return torch.arange(keys) < lengths
    if kind == "bool":
        return torch.rand(batch, 1, queries, keys, generator=generator) > 0.4
    if kind == "float":
        return 3 * torch.randn(1, heads, queries, keys, generator=generator)
    return torch.randn(queries, keys, generator=generator).masked_fill_(torch.eye(queries, keys).bool(), -INF)


def oracle(inputs: list[Tensor], mask: Tensor | None, kept: Tensor | None, p: float, causal: bool, scale: float) -> Any:
    """Output and gradients in float64, by autograd."""
    q, k, v, grad = (x.double().detach().requires_grad_() for x in inputs)
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -INF)
    # A row in which all is forbidden gives zeros.
    dead = (scores == -INF).all(-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    if kept is not None:
        weights = weights * kept.double() / (1.0 - p)
    out = weights @ v
    return out, torch.autograd.grad(out, [q, k, v], grad)


def run(inputs: list[Tensor], mask: Tensor | None, keep: Tensor | None, p: float, causal: bool, scale: float) -> Any:
    q, k, v, grad = inputs
    given = (mask, keep, 1.0 / (1.0 - p), scale, causal)
    out, log_sums = short_attention(q, k, v, *given)
    return out, short_attention_backward(grad, q, k, v, *given, log_sums)


def check(
    inputs: list[Tensor],
    mask: Tensor | None,
    *,
    p: float = 0.0,
    causal: bool = False,
    scale: float,
    bound: float = 4e-6,
) -> None:
    q, k = inputs[:2]
    keep = kept = None
    if p:
        weights = torch.empty(*q.shape[:3], k.shape[2])
        state = torch.get_rng_state()
        keep = bernoulli_bits(weights, 1.0 - p)
        torch.set_rng_state(state)
        kept = torch.empty_like(weights).bernoulli_(1.0 - p)
    out, grads = run(inputs, mask, keep, p, causal, scale)
    wanted_out, wanted = oracle(inputs, mask, kept, p, causal, scale)
    for found, want in ((out, wanted_out), *zip(grads, wanted, strict=True)):
        assert found.shape == want.shape
        assert found.transpose(1, 2).is_contiguous()
        assert (found - want).abs().max() <= bound * (1.0 + want.abs().max())


@pytest.mark.parametrize("kind", ["none", "padding", "bool", "float", "float with -inf"])
@pytest.mark.parametrize("sizes", [(2, 3, 16, 16, 32), (1, 2, 5, 23, 16), (2, 1, 13, 1, 48), (1, 1, 1, 7, 16)])
def test_masks_and_sizes(cpu_target: str, kind: str, sizes: tuple[int, ...]) -> None:
    check(operands(*sizes), mask_of(kind, *sizes[:4]), scale=0.3)


@pytest.mark.parametrize("queries", [1, 6, 7, 12, 13])
@pytest.mark.parametrize("keys", [4, 8, 9, 15, 16, 17, 33])
def test_dropout_and_causal(cpu_target: str, queries: int, keys: int) -> None:
    inputs = operands(2, 2, queries, keys, 16)
    check(inputs, None, p=0.3, scale=0.25)
    check(inputs, None, causal=True, scale=0.25)
    check(inputs, mask_of("padding", 2, 2, queries, keys), p=0.1, causal=True, scale=0.25)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 70), st.sampled_from([16, 32, 64, 80]),
    st.sampled_from(["none", "padding", "bool", "float"]), st.sampled_from([0.0, 0.1]), st.integers(0, 3),
)  # fmt: skip
def test_any_attention(
    core: Any, batch: int, heads: int, queries: int, keys: int, width: int, kind: str, p: float, gaps: int
) -> None:
    sizes = (batch, heads, queries, keys)
    check(operands(*sizes, width, gaps=gaps), mask_of(kind, *sizes), p=p, scale=width**-0.5)


def test_large_scores_and_any_layout(cpu_target: str) -> None:
    inputs = [30 * x.contiguous() for x in operands(1, 2, 9, 20, 32)]
    # A score of 90 has an error of 4e-6 of its own.
    check(inputs, None, scale=0.02, bound=1e-4)
    # Columns that do not lie side by side are copied.
    turned = [x.transpose(-2, -1).contiguous().transpose(-2, -1) for x in inputs]
    found, wanted = run(turned, None, None, 0.0, False, 0.02), run(inputs, None, None, 0.0, False, 0.02)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))
    # Weights that are 0 in fp32.
    q, k, v, _ = operands(1, 1, 4, 12, 16)
    sharp, _ = short_attention(q, k, v, None, None, 1.0, 400.0, False)
    best = (q @ k.transpose(-2, -1)).argmax(-1)
    assert torch.allclose(sharp, v[0, 0, best[0, 0]], atol=1e-6)


def test_nothing_allowed_nan_and_infinity(cpu_target: str) -> None:
    inputs = operands(1, 1, 6, 10, 16)
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[2] = False
    for one in (mask, torch.zeros(6, 10).masked_fill_(~mask, -INF)):
        out, (dq, dk, dv) = run(inputs, one, None, 0.0, False, 0.25)
        assert out[0, 0, 2].eq(0).all()
        assert dq[0, 0, 2].eq(0).all()
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    own = torch.nn.functional.scaled_dot_product_attention
    for place, bad in ((0, math.nan), (0, INF), (1, math.nan), (1, -INF), (2, math.nan), (2, INF)):
        q, k, v, _ = (x.clone() for x in inputs)
        (q, k, v)[place][0, 0, 3, 5] = bad
        for one in (None, mask):
            found = short_attention(q, k, v, one, None, 1.0, 0.25, False)[0]
            assert torch.equal(found.isnan(), own(q.double(), k.double(), v.double(), one, scale=0.25).isnan())


def test_the_same_bits_in_every_batch_padding_and_number_of_threads(core: Any, one_thread_then_two: list[int]) -> None:
    inputs = operands(6, 4, 20, 20, 32)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 11)) for x in inputs]
    allowed = torch.arange(31) < 20
    found = []
    for threads in one_thread_then_two:
        torch.set_num_threads(threads)
        whole = run(inputs, None, None, 0.0, False, 0.2)
        parts = [run([x[i : i + 1] for x in inputs], None, None, 0.0, False, 0.2) for i in range(6)]
        longer = run(padded, allowed, None, 0.0, False, 0.2)
        found.append((whole[0], *whole[1]))
        found.append((torch.cat([p[0] for p in parts]), *[torch.cat([p[1][i] for p in parts]) for i in range(3)]))
        found.append((longer[0][:, :, :20], *[x[:, :, :20] for x in longer[1]]))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_empty(core: Any) -> None:
    for sizes in ((0, 2, 3, 4, 16), (2, 0, 3, 4, 16), (2, 2, 0, 4, 16)):
        q, k, v, grad = operands(*sizes)
        out, log_sums = short_attention(q, k, v, None, None, 1.0, 1.0, False)
        assert out.shape == q.shape
        grads = short_attention_backward(grad, q, k, v, None, None, 1.0, 1.0, False, log_sums)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
        assert all(x.eq(0).all() for x in grads)
    q, k, v, _ = operands(2, 2, 3, 0, 16)
    assert short_attention(q, k, v, None, None, 1.0, 1.0, False)[0].eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 2, 5, 12)}, "key has sizes"),
        ({"query": torch.randn(2, 2, 5, 16).double()}, "query must be float32 on the CPU"),
        ({"query": torch.randn(2, 5, 16)}, "query and key must have dimensions"),
        ({"value": torch.randn(2, 2, 6, 16)}, r"value has sizes \(2, 2, 6, 16\), expected \(2, 2, 7, 16\)"),
        ({"key": torch.randn(2, 2, 16, 7).transpose(2, 3)}, "key has strides"),
        ({"mask": torch.zeros(2, 2, 5, 6)}, r"mask must be bool or float32 on the CPU, expanded to \(2, 2, 5, 7\)"),
        ({"mask": torch.zeros(2, 2, 5, 7, dtype=torch.int32)}, "mask must be bool or float32"),
        ({"keep": torch.zeros(3, dtype=torch.uint8)}, "keep must be 18 contiguous uint8"),
    ],
)
def test_errors_name_the_argument(core: Any, change: dict[str, Tensor], message: str) -> None:
    q, k, v, _ = operands(2, 2, 5, 7, 16)
    given = {"query": q, "key": k, "value": v, "mask": None, "keep": None, "on": 1.0, "scale": 1.0, "causal": False}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyft.short_attention(**{**given, **change})


def test_opcheck_and_reference(core: Any) -> None:
    tests = ("test_schema", "test_faketensor")
    inputs = operands(2, 2, 5, 7, 16)
    q, k, v, grad = inputs
    keep = bernoulli_bits(torch.empty(2, 2, 5, 7), 0.7)
    for mask in (None, mask_of("bool", 2, 2, 5, 7).expand(2, 2, 5, 7)):
        given = (mask, keep, 1.0 / 0.7, 0.25, False)
        out, log_sums = short_attention(q, k, v, *given)
        torch.library.opcheck(torch.ops.pyft.short_attention.default, (q, k, v, *given), test_utils=tests)
        backward = (grad, q, k, v, *given, log_sums)
        torch.library.opcheck(torch.ops.pyft.short_attention_backward.default, backward, test_utils=tests)
        wanted, wanted_sums = short_attention_reference(q, k, v, *given)
        assert torch.allclose(out, wanted, atol=2e-6)
        assert torch.allclose(log_sums, wanted_sums, atol=1e-6)
        found = short_attention_backward(*backward)
        pairs = zip(found, short_attention_backward_reference(*backward), strict=True)
        assert all(torch.allclose(a, b, atol=3e-6) for a, b in pairs)
