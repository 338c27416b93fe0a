"""Linear layers in some tokens, and their gradients, against products in float64, on every CPU target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyft.ops.token_linear import (
    token_linear,
    token_linear_backward,
    token_linear_backward_reference,
    token_linear_reference,
)

forward_op, backward_op = torch.ops.pyft.token_linear, torch.ops.pyft.token_linear_backward


def layer(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and the gradient of the output; NaN where nothing may be read is up to the test."""
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def some(rows: int, share: float) -> Tensor:
    return (torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < share).nonzero().squeeze(1)


def near(found: Tensor, wanted: Tensor, terms: Tensor) -> bool:
    """Errors of each number, in units of the terms that were added for it."""
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= 1e-6 * terms + 1e-30).all())


def check(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, tokens: Tensor) -> None:
    """Padding holds NaN: what reads it cannot be right."""
    there = torch.zeros(len(x), dtype=torch.bool)
    there[tokens] = True
    x, grad = x.clone(), grad.clone()
    x[~there], grad[~there] = torch.nan, torch.nan
    out = token_linear(x, weight, bias, tokens)
    dx, dw, db = token_linear_backward(grad, x, weight, tokens, need_input=True, need_weight=True, need_bias=True)
    assert dx is not None
    assert dw is not None
    assert db is not None
    x, weight, grad = x[tokens].double(), weight.double(), grad[tokens].double()
    shift = torch.zeros(len(weight)).double() if bias is None else bias.double()
    assert near(out[tokens], x @ weight.t() + shift, x.abs() @ weight.abs().t() + shift.abs())
    assert near(dx[tokens], grad @ weight, grad.abs() @ weight.abs())
    assert near(dw, grad.t() @ x, grad.abs().t() @ x.abs())
    assert near(db, grad.sum(0), grad.abs().sum(0))
    assert not out[~there].any()
    assert not dx[~there].any()


@pytest.mark.parametrize("rows", [1, 7, 33, 48, 49, 385, 800])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (64, 17), (384, 130), (500, 200), (31, 250)])
@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_sizes(cpu_target: str, rows: int, shape: tuple[int, int], share: float) -> None:
    x, weight, bias, grad = layer(rows, *shape)
    check(x, weight, bias, grad, some(rows, share))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 130), st.integers(1, 420), st.integers(1, 120), st.integers(0, 3), st.floats(0, 1))
def test_any_matrices_inside_others(core, rows: int, inputs: int, outputs: int, skip: int, share: float) -> None:
    x, weight, _, grad = layer(rows, inputs + skip, outputs + skip)
    check(x[:, skip:], weight[skip:, skip:], None, grad[:, skip:], some(rows, share))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing(core, shape: tuple[int, int]) -> None:
    x, weight, bias, grad = layer(6, *shape)
    for tokens in (torch.arange(6), torch.empty(0, dtype=torch.int64)):
        check(x, weight, bias, grad, tokens)


def test_only_what_is_wanted(core) -> None:
    x, weight, _, grad = layer(50, 70, 30)
    tokens = some(50, 0.5)
    whole = token_linear_backward(grad, x, weight, tokens, need_input=True, need_weight=True, need_bias=True)
    for wanted in range(8):
        needs = [bool(wanted >> i & 1) for i in range(3)]
        found = token_linear_backward(
            grad, x if needs[1] else None, weight, tokens, need_input=needs[0], need_weight=needs[1], need_bias=needs[2]
        )
        assert [part is not None for part in found] == needs
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, whole, strict=True) if a is not None)


def test_a_token_has_the_same_bits_in_every_batch(core, one_thread_then_two: list[int]) -> None:
    x, weight, bias, grad = layer(1000, 500, 300)
    every = torch.arange(1000)
    found, gradients = [], []
    for threads in one_thread_then_two:
        torch.set_num_threads(threads)
        found.append(token_linear(x, weight, bias, every))
        found.append(sum(token_linear(x, weight, bias, part) for part in (every[::2], every[1::2])))
        gradients.append(
            token_linear_backward(grad, x, weight, every, need_input=True, need_weight=True, need_bias=True)
        )
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


def test_a_large_weight_leaves_no_memory_behind(core) -> None:
    """Its packed copy is far above what a thread keeps."""
    x, weight, bias, grad = layer(8, 1024, 9000)
    check(x, weight, bias, grad, some(8, 0.7))
    check(*layer(8, 64, 64), some(8, 0.7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.randn(4, 9)}, "input has 9 columns but weight has 8"),
        ({"input": torch.randn(4, 8).double()}, "input must be a float32 matrix"),
        ({"weight": torch.randn(8, 20).t()}, r"weight has strides \(1, 20\)"),
        ({"bias": torch.randn(4)}, "bias must be 20 contiguous float32"),
        ({"tokens": torch.tensor([0, 4])}, r"tokens\[1\] is 4; they must ascend and lie below 4"),
        ({"tokens": torch.tensor([1, 1])}, r"tokens\[1\] is 1"),
        ({"tokens": torch.tensor([-1])}, r"tokens\[0\] is -1"),
        ({"tokens": torch.tensor([1.0])}, "tokens must be contiguous int64"),
    ],
)
def test_errors_name_the_argument(core, change: dict[str, Tensor], message: str) -> None:
    given = {"input": torch.randn(4, 8), "weight": torch.randn(20, 8), "bias": None, "tokens": torch.tensor([0, 2])}
    with pytest.raises(RuntimeError, match=message):
        forward_op(**{**given, **change})


def test_errors_of_backward(core) -> None:
    x, weight, _, grad = layer(4, 8, 20)
    tokens = torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match="grad has 19 columns but weight has 20 rows"):
        backward_op(grad[:, 1:].contiguous(), x, weight, tokens, True, True, True)
    with pytest.raises(RuntimeError, match=r"input has sizes \(3, 8\) but grad and weight ask for \(4, 8\)"):
        backward_op(grad, x[1:], weight, tokens, True, True, True)


def test_opcheck_and_reference(core) -> None:
    x, weight, bias, grad = layer(9, 20, 18)
    tokens = torch.tensor([1, 4, 8])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op.default, (x, weight, bias, tokens), test_utils=tests)
    assert torch.allclose(
        token_linear_reference(x, weight, bias, tokens), forward_op(x, weight, bias, tokens), atol=1e-5
    )
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(backward_op.default, (grad, x, weight, tokens, *needs), test_utils=tests)
        found = backward_op(grad, x, weight, tokens, *needs)
        parts = token_linear_backward_reference(grad, x, weight, tokens, *needs)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, parts, strict=True))
