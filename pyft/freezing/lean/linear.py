"""Linear layers with a frozen weight. torch keeps no input for them, but under autocast a cast copy of each weight."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from pyft.freezing.lean.conditions import acts_on, as_autocast


@dataclass(frozen=True)
class Producer:
    """How the output of a frozen linear layer is made again: again(*tensors)."""

    output: weakref.ref[Tensor]
    version: int
    tensors: tuple[Tensor, ...]
    again: Callable[..., Tensor]


class _Latest(threading.local):
    """The last linear layer that ran. One place and no attribute of its output: that may live long, and its input
    with it."""

    producer: Producer | None = None

    def note(self, producer: Producer) -> None:
        self.producer = producer

    def forget(self, output: object) -> None:
        if self.producer is not None and self.producer.output is output:
            self.producer = None


_latest = _Latest()


def producer_of(x: Tensor) -> Producer | None:
    """The frozen linear layer that gave `x` just now, unless `x` was changed since or its input is no smaller."""
    producer = _latest.producer
    if producer is None or producer.output() is not x or producer.version != x._version:
        return None
    source = producer.tensors[0]
    return producer if source.numel() * source.element_size() < x.numel() * x.element_size() else None


class _CastLinear(Function):
    """x (..., in) times a frozen weight of a wider dtype, which is cast again for backward. A bias may train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        dx = rows.mm(weight.to(grad.dtype)).view(*grad.shape[:-1], weight.shape[1])
        db = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, db


class LeanLinear(nn.Linear):
    """`nn.Linear` that under autocast keeps no cast copy of its frozen weight."""

    def forward(self, input: Tensor) -> Tensor:
        if not acts_on(input, self.weight) or not torch.is_autocast_enabled(input.device.type) or input.ndim < 2:
            return super().forward(input)
        x = as_autocast(input)
        if x.dtype == self.weight.dtype or self.weight.dtype == torch.float64:
            return super().forward(input)
        return _CastLinear.apply(x, self.weight, self.bias)


class ProducingLinear(LeanLinear):
    """`LeanLinear` that notes how to make its output again, for the activation that comes next."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if acts_on(input, self.weight):
            x = as_autocast(input).detach()
            tensors = (x, self.weight) if self.bias is None else (x, self.weight, self.bias.detach())
            _latest.note(Producer(weakref.ref(y, _latest.forget), y._version, tensors, F.linear))
        return y


FORMS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LeanLinear}
PRODUCING_FORMS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ProducingLinear}
