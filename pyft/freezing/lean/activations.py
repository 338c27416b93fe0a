"""Activations: one bit for each element where the gradient is on or off, else computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from pyft.freezing.lean.bit_gradients import gradient_by_bits, keep_bits
from pyft.freezing.lean.conditions import acts_on, has_kernels, refuse_second, same_autocast
from pyft.freezing.lean.linear import Producer, producer_of
from pyft.ops.bit_masks import (
    INSIDE,
    NOT_OUTSIDE,
    POSITIVE,
    RELU,
    gap_free,
    mask_by_bits,
    pack_bits,
    relu_bits,
    relu_bits_,
)


class _Relu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if not inplace:
            y, bits = relu_bits(x)
        elif gap_free(x) is x:
            y, bits = x, relu_bits_(x)
        else:
            y = torch.relu_(x)
            bits = pack_bits(gap_free(y), RELU)
        if inplace:
            ctx.mark_dirty(x)
        keep_bits(ctx, y, bits)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gradient_by_bits(ctx, grad, mask_by_bits), None


class _Piecewise(Function):
    """An activation with slope 1 where `test` holds for its output, and slope `off` elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], inplace: bool, test: int, low: float, high: float,
        off: float,
    ) -> Tensor:  # fmt: skip
        y = run(x)
        if inplace:
            ctx.mark_dirty(x)
        keep_bits(ctx, y, pack_bits(gap_free(y), test, low, high))
        ctx.off = off
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (gradient_by_bits(ctx, grad, mask_by_bits, ctx.off), *[None] * 6)


def _takes_bits(x: Tensor) -> bool:
    return acts_on(x) and x.layout == torch.strided and x.is_floating_point() and has_kernels(x)


def lean_relu(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu` that keeps one bit for each element; torch's own where nothing is to be kept."""
    return _Relu.apply(x, inplace) if _takes_bits(x) else F.relu(x, inplace)


class LeanReLU(nn.ReLU):
    """`nn.ReLU` that keeps one bit for each element."""

    def forward(self, input: Tensor) -> Tensor:
        return lean_relu(input, self.inplace)


class _LeanClamp(nn.Hardtanh):
    def forward(self, input: Tensor) -> Tensor:
        if not _takes_bits(input):
            return super().forward(input)
        # At NaN torch stops the gradient on the CPU, but in the ends of its vectors, and lets it through on CUDA.
        test = NOT_OUTSIDE if input.is_cuda else INSIDE
        return _Piecewise.apply(input, super().forward, self.inplace, test, self.min_val, self.max_val, 0.0)


class LeanHardtanh(_LeanClamp):
    """`nn.Hardtanh` that keeps one bit for each element."""


class LeanReLU6(_LeanClamp, nn.ReLU6):
    """`nn.ReLU6` that keeps one bit for each element."""


class LeanLeakyReLU(nn.LeakyReLU):
    """`nn.LeakyReLU` that keeps one bit for each element."""

    def forward(self, input: Tensor) -> Tensor:
        # With a negative slope the sign of the output does not tell that of the input.
        if not _takes_bits(input) or self.negative_slope < 0:
            return super().forward(input)
        slope = float(self.negative_slope)
        return _Piecewise.apply(input, super().forward, self.inplace, POSITIVE, 0.0, 0.0, slope)


class _Again(Function):
    """run(x), computed again in the backward pass: of all that it makes, only x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run, ctx.autocast = run, same_autocast(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        second = torch.is_grad_enabled()
        with torch.enable_grad(), ctx.autocast:
            leaf = x if second else x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(ctx.run(leaf), leaf, grad, create_graph=second)
        return dx, None


class _AgainFromLinear(Function):
    """run(x) of what a frozen linear layer gave: that layer's input is kept, and both are computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], producer: Producer) -> Tensor:
        ctx.save_for_backward(*producer.tensors)
        ctx.run, ctx.again, ctx.autocast = run, producer.again, same_autocast(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second("an activation after a linear layer")
        with ctx.autocast:
            leaf = ctx.again(*ctx.saved_tensors)
            with torch.enable_grad():
                leaf = leaf.detach().requires_grad_()
                (dx,) = torch.autograd.grad(ctx.run(leaf), leaf, grad)
        return dx, None, None


def computed_again(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(x); the backward pass keeps `x` alone and runs it again."""
    return _Again.apply(x, run) if acts_on(x) else run(x)


def from_producer(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(x); where `x` came straight from a frozen linear layer with a smaller input, that is kept instead of `x`."""
    producer = producer_of(x) if acts_on(x) else None
    return run(x) if producer is None else _AgainFromLinear.apply(x, run, producer)


class RecomputedGELU(nn.GELU):
    """`nn.GELU` that keeps the input of the frozen linear layer before it, and computes both again."""

    def forward(self, input: Tensor) -> Tensor:
        return from_producer(input, super().forward)


class RecomputedSiLU(nn.SiLU):
    """`nn.SiLU` that keeps the input of the frozen linear layer before it, and computes both again."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.inplace else from_producer(input, super().forward)


BIT_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: LeanReLU,
    nn.ReLU6: LeanReLU6,
    nn.Hardtanh: LeanHardtanh,
    nn.LeakyReLU: LeanLeakyReLU,
}
RECOMPUTED_FORMS: dict[type[nn.Module], type[nn.Module]] = {nn.GELU: RecomputedGELU, nn.SiLU: RecomputedSiLU}
