"""`F.linear` on the CPU by the core's products, which leave out tokens that are only padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyft.freezing.lean.conditions import is_float32_on_cpu
from pyft.ops.packed_linear import LEAST_WIDTH, packing_pays
from pyft.ops.token_linear import token_linear, token_linear_backward

PACKING = 20
"""A weight is packed in the time of the products of so many rows."""


class _TokenLinear(Function):
    """x (B, T, N) times weight (O, N), plus bias, in the tokens (t,) of B * T; zeros in the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, tokens)
        ctx.sizes = x.shape
        return token_linear(x.flatten(0, 1), weight, bias, tokens).view(*x.shape[:2], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, tokens = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = grad.flatten(0, 1)
        inputs = None if x is None else x.flatten(0, 1)
        if torch.is_grad_enabled():
            there = rows.new_zeros(rows.shape).index_copy(0, tokens, rows.index_select(0, tokens))
            dx = there.mm(weight) if need_input else None
            dw = there.t().mm(inputs) if inputs is not None else None
            db = there.sum(0) if need_bias else None
        else:
            dx, dw, db = token_linear_backward(
                rows, inputs, weight, tokens, need_input=need_input, need_weight=need_weight, need_bias=need_bias
            )
        return None if dx is None else dx.view(ctx.sizes), dw, db, None


def leaving_out_pays(mask: Tensor) -> bool:
    """Whether `TokenLinear` acts on a batch with this mask (B, T): there is enough padding for what packing takes."""
    tokens = int(mask.count_nonzero())
    return 0 < tokens <= mask.numel() - PACKING and packing_pays()


class TokenLinear:
    """`F.linear` of a forward pass whose batch has padding.

    Args:
        mask: (B, T), 0 where a token is padding and its outputs are of no use to anybody.
    """

    def __init__(self, mask: Tensor) -> None:
        self._shape = mask.shape
        self._tokens = mask.reshape(-1).nonzero().squeeze(1) if leaving_out_pays(mask) else None

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """The product by the core; None where it is to be torch's own: for other tensors than (B, T, N)."""
        tokens = self._tokens
        if tokens is None or not _fits(input, weight, bias) or input.shape[:2] != self._shape:
            return None
        return _TokenLinear.apply(input, weight, bias, tokens)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        is_float32_on_cpu(x)
        and is_float32_on_cpu(weight)
        and x.ndim == 3
        and x.shape[2] > 0
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and min(weight.shape) >= LEAST_WIDTH
        and weight.stride(1) == 1
        and (bias is None or (is_float32_on_cpu(bias) and bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not torch.is_autocast_enabled("cpu")
    )
