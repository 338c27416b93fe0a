"""Dropout that keeps one bit for each element, where torch keeps a mask of the input's dtype on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pyft.freezing.lean.bit_gradients import gradient_by_bits, keep_bits
from pyft.freezing.lean.conditions import acts_on
from pyft.ops.bit_masks import POSITIVE, pack_bits, scale_by_bits


class _Dropout(Function):
    """torch's dropout: the same draws from the same generator, so that the same state gives the same output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        noise = torch.empty_like(x).bernoulli_(1 - p)
        bits = pack_bits(noise, POSITIVE)
        # What torch divides its mask by, rounded as it rounds.
        ctx.on = torch.ones((), dtype=x.dtype).div_(1 - p).item()
        keep_bits(ctx, noise, bits)
        return scale_by_bits(x if x.stride() == noise.stride() else noise.copy_(x), bits, ctx.on)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gradient_by_bits(ctx, grad, scale_by_bits, ctx.on), None


class LeanDropout(nn.Dropout):
    """`nn.Dropout` that keeps one bit for each element."""

    def forward(self, input: Tensor) -> Tensor:
        on = self.training and 0.0 < self.p < 1.0 and not self.inplace
        if not on or not acts_on(input) or not input.is_cpu or not input.is_floating_point():
            return super().forward(input)
        return _Dropout.apply(input, self.p)


FORMS: dict[type[nn.Module], type[nn.Module]] = {nn.Dropout: LeanDropout}
