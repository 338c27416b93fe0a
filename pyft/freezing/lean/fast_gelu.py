"""`F.gelu` on the CPU by the core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyft.freezing.lean.conditions import is_float32_on_cpu
from pyft.ops.gelu import gelu, gelu_backward

LEAST_ELEMENTS = 4096
"""Of fewer torch's call is over before the core's began."""


class _Gelu(Function):
    """Keeps its input, as torch's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x) if torch.is_grad_enabled() else gelu_backward(grad, x)


def gelu_call(input: Tensor, approximate: str = "none") -> Tensor | None:
    """`F.gelu` by the core; None where it is to be torch's own."""
    from pyft.core.loader import load_core

    fits = (
        approximate == "none"
        and is_float32_on_cpu(input)
        and input.is_contiguous()
        and input.numel() >= LEAST_ELEMENTS
        and load_core() is not None
    )
    return _Gelu.apply(input) if fits else None
