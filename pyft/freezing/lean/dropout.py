"""Dropout that keeps one bit for each element, where torch keeps a mask of the input's dtype on the CPU."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from pyft.freezing.lean.bit_gradients import dropped, gradient_by_bits, keep_bits, keep_draws
from pyft.freezing.lean.conditions import acts_on
from pyft.ops.bit_masks import scale_by_bits


class _Dropout(Function):
    """torch's dropout: the same draws from the same generator, so that the same state gives the same output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        bits, ctx.on = keep_draws(x, p)
        y = dropped(x, bits, ctx.on)
        keep_bits(ctx, y, bits)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gradient_by_bits(ctx, grad, scale_by_bits, ctx.on), None


def lean_dropout(x: Tensor, p: float) -> Tensor:
    """`torch.nn.functional.dropout` in training mode, with one bit kept for each element."""
    if not 0.0 < p < 1.0 or not acts_on(x) or not x.is_cpu or not x.is_floating_point():
        return F.dropout(x, p, True)
    return _Dropout.apply(x, p)


class LeanDropout(nn.Dropout):
    """`nn.Dropout` that keeps one bit for each element."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.inplace:
            return super().forward(input)
        return lean_dropout(input, self.p)


FORMS: dict[type[nn.Module], type[nn.Module]] = {nn.Dropout: LeanDropout}
