"""Gradients that are the incoming ones times a factor chosen by one kept bit for each element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyft.freezing.lean.conditions import laid_out_as
from pyft.ops.bit_masks import gap_free, pack_bools, scale_by_bits
from pyft.ops.random_bits import bernoulli_bits

# (grad, bits, *numbers or per-channel values) -> gradient, linear in grad and its own adjoint.
ByBits = Callable[..., Tensor]


class _ByBits(Function):
    """A backward pass that can itself be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, apply: ByBits, *rest: Any) -> Tensor:
        ctx.by_bits, ctx.rest, ctx.strides = apply, rest, grad.stride()
        return apply(grad, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (_ByBits.apply(laid_out_as(grad, ctx.strides), ctx.by_bits, *ctx.rest), None, *[None] * len(ctx.rest))


def keep_bits(ctx: Any, y: Tensor, bits: Tensor, *tensors: Tensor) -> None:
    """Keep the bits of `y`, which were packed in the order of its memory."""
    ctx.save_for_backward(bits, *tensors)
    ctx.strides = gap_free(y).stride()


def gradient_by_bits(ctx: Any, grad: Tensor, apply: ByBits, *rest: Any) -> Tensor:
    """apply(grad, bits, *rest) with `grad` in the order in which the bits were packed."""
    grad = laid_out_as(grad, ctx.strides)
    bits = ctx.saved_tensors[0]
    if torch.is_grad_enabled() and grad.requires_grad:
        return _ByBits.apply(grad, apply, bits, *rest)
    return apply(grad, bits, *rest)


def has_fused_dropout(x: Tensor) -> bool:
    """Whether torch's dropout of `x` is the operation `native_dropout`, which makes a bool mask, as on CUDA."""
    return x.is_cuda


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """Dropout of `x`: the output, its draws as bits, and what is kept is multiplied by.

    The same draws from the same generator as in torch. The bits are in the order of the memory of the output, made
    gap-free, which is that of `empty_like(x)`.
    """
    if has_fused_dropout(x):
        # Its draws depend on the grid that torch chooses, and under a CUDA graph on state that only torch can read.
        y, mask = torch.native_dropout(x, p, True)
        return y, pack_bools(laid_out_as(mask, gap_free(y).stride())), 1.0 / (1.0 - p)
    # Elsewhere torch draws as many numbers of the dtype of x, divides its mask by this, and rounds.
    bits = bernoulli_bits(x, 1 - p)
    on = torch.ones((), dtype=x.dtype).div_(1 - p).item()
    return dropped(x, bits, on), bits, on


def dropped(x: Tensor, bits: Tensor, on: float) -> Tensor:
    """`x` with dropout by these bits. Also the gradient, which needs the strides that `x` had."""
    if not x.is_contiguous():
        x = laid_out_as(x, torch.empty_like(x, device="meta").stride())
    return scale_by_bits(x, bits, on)
