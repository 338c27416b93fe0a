"""A Linear layer in the tokens that are there, on the CPU: padding costs nothing, and comes out as zeros."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyft.ops.library import LIBRARY, define

define("token_linear(Tensor input, Tensor weight, Tensor? bias, Tensor tokens) -> Tensor")
define(
    "token_linear_backward(Tensor grad, Tensor input, Tensor weight, Tensor tokens, bool need_input, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def token_linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """The same as `token_linear` in PyTorch, for any real dtype and device."""
    out = input.new_zeros(len(input), len(weight))
    return out.index_copy_(0, tokens, F.linear(input.index_select(0, tokens), weight, bias))


def token_linear_backward_reference(
    grad: Tensor, input: Tensor, weight: Tensor, tokens: Tensor, need_input: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `token_linear_backward` in PyTorch, for any real dtype and device."""
    there, nothing = grad.index_select(0, tokens), grad.new_empty(0)
    dx = grad.new_zeros(len(grad), weight.shape[1]).index_copy_(0, tokens, there.mm(weight)) if need_input else nothing
    dw = there.t().mm(input.index_select(0, tokens)) if need_weight else nothing
    return dx, dw, there.sum(0) if need_bias else nothing


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    return input.new_empty(len(input), len(weight))


def _backward_fake(
    grad: Tensor, input: Tensor, weight: Tensor, tokens: Tensor, need_input: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty((len(grad), weight.shape[1]) if need_input else 0),
        grad.new_empty(weight.shape if need_weight else 0),
        grad.new_empty(len(weight) if need_bias else 0),
    )


LIBRARY.impl("token_linear", token_linear_reference, "CompositeExplicitAutograd")
LIBRARY.impl("token_linear_backward", token_linear_backward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::token_linear", _fake, lib=LIBRARY)
torch.library.register_fake("pyft::token_linear_backward", _backward_fake, lib=LIBRARY)


def token_linear(input: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """`F.linear` in some rows, without gradient; zeros in the others.

    The terms of a number are added in the order of inputs, whatever the number of tokens and threads is: a token has
    the same bits in every batch.

    Args:
        input: (T, N).
        weight: (O, N).
        bias: (O,) or None.
        tokens: (t,) int64, the rows that count, ascending.

    Returns:
        (T, O).

    Raises:
        RuntimeError: sizes do not fit, or `tokens` does not ascend.

    >>> x = torch.tensor([[1.0, 1.0], [9.0, 9.0]])
    >>> token_linear(x, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None, torch.tensor([0]))
    tensor([[3., 7.],
            [0., 0.]])
    """
    return torch.ops.pyft.token_linear(_with_rows(input), _with_rows(weight), bias, tokens.contiguous())


def token_linear_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor,
    tokens: Tensor,
    *,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `token_linear`, from that of its output. Sums over tokens have the same bits for any threads.

    Args:
        grad: (T, O).
        input: (T, N); None where the weight's gradient is not wanted.
        weight: (O, N). tokens: (t,) int64.
        need_input: whether (T, N), zeros in rows that are no tokens, is wanted; need_weight: (O, N); need_bias: (O,).

    Returns:
        The gradients of input, weight and bias; None for what is not wanted.

    >>> grad, x, w = torch.tensor([[1.0], [7.0]]), torch.tensor([[3.0, 4.0], [9.0, 9.0]]), torch.tensor([[1.0, 2.0]])
    >>> token_linear_backward(grad, x, w, torch.tensor([0]), need_input=False, need_weight=True, need_bias=True)[1:]
    (tensor([[3., 4.]]), tensor([1.]))
    """
    grad, tokens = _with_rows(grad), tokens.contiguous()
    db = None
    if need_bias and not need_weight:
        db, need_bias = grad.index_select(0, tokens).sum(0), False
    dx, dw, sums = torch.ops.pyft.token_linear_backward(
        grad,
        grad if input is None else _with_rows(input),
        _with_rows(weight),
        tokens,
        need_input,
        need_weight,
        need_bias,
    )
    return dx if need_input else None, dw if need_weight else None, sums if need_bias else db


def _with_rows(matrix: Tensor) -> Tensor:
    """The matrix with the entries of a row side by side."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()
