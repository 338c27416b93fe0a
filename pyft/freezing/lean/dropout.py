"""Dropout that keeps one bit for each element. torch keeps a mask: bool on CUDA, elsewhere of its input's dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from pyft.freezing.lean.bit_gradients import drop, gradient_by_bits, keep_bits
from pyft.freezing.lean.conditions import acts_on, has_kernels
from pyft.ops.bit_masks import scale_by_bits


class _Dropout(Function):
    """torch's dropout: the same draws from the same generator, so that the same state gives the same output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        y, bits, ctx.on = drop(x, p)
        keep_bits(ctx, y, bits)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gradient_by_bits(ctx, grad, scale_by_bits, ctx.on), None


def lean_dropout(x: Tensor, p: float) -> Tensor:
    """`torch.nn.functional.dropout` in training mode, with one bit kept for each element."""
    takes_bits = 0.0 < p < 1.0 and acts_on(x) and x.is_floating_point() and x.layout == torch.strided
    return _Dropout.apply(x, p) if takes_bits and x.numel() and has_kernels(x) else F.dropout(x, p, True)


class LeanDropout(nn.Dropout):
    """`nn.Dropout` that keeps one bit for each element."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.inplace:
            return super().forward(input)
        return lean_dropout(input, self.p)


FORMS: dict[type[nn.Module], type[nn.Module]] = {nn.Dropout: LeanDropout}
