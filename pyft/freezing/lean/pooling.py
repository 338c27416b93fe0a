"""Pooling: max pooling keeps one byte for each output, average pooling the size of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.utils import _pair, _single

from pyft.core.loader import load_core
from pyft.freezing.lean.conditions import acts_on, has_kernels, is_eager, refuse_second, stand_in
from pyft.ops.max_pool import MOST_PLACES, fits_core, max_pool_backward, max_pool_offsets, pooled_size


class _MaxPool(Function):
    """torch's max pooling of x (N, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[int, ...], ceil_mode: bool) -> Tensor:
        y, at = max_pool_offsets(x, window, ceil_mode)
        ctx.save_for_backward(at)
        ctx.size, ctx.window, ctx.last = x.shape, window, not y.is_contiguous()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second("max pooling")
        return max_pool_backward(grad, ctx.saved_tensors[0], ctx.size, ctx.window, ctx.last), None, None


def _window(pool: nn.MaxPool1d | nn.MaxPool2d, axes: int) -> tuple[int, ...]:
    """Kernel, stride, padding and dilation, each (height, width); one row for axes = 1."""
    stride = pool.stride if pool.stride is not None else pool.kernel_size
    values = (pool.kernel_size, stride, pool.padding, pool.dilation)
    if axes == 2:
        return tuple(int(n) for value in values for n in _pair(value))
    ones = (1, 1, 0, 1)
    return tuple(n for one, value in zip(ones, values, strict=True) for n in (one, int(_single(value)[0])))


def _lean_max_pool(pool: nn.MaxPool1d | nn.MaxPool2d, x: Tensor, axes: int) -> Tensor | None:
    """The pooled x (C, ...) or (N, C, ...); None where torch must do it."""
    if not is_eager(x) or pool.return_indices or not fits_core(x) or not x.numel():
        return None
    keeps = acts_on(x)
    if keeps and not has_kernels(x):
        return None
    # torch's own kernel takes up to four times as long on the CPU, so that ours serves passes without gradient, too.
    if not keeps and (not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()) or load_core() is None):
        return None
    window = _window(pool, axes)
    kernel, padding = window[:2], window[4:6]
    fits = x.ndim - axes in (1, 2) and kernel[0] * kernel[1] <= MOST_PLACES and min(window[:4] + window[6:]) > 0
    # What torch refuses, torch shall refuse.
    if not fits or any(p < 0 or 2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return None
    planes = x if axes == 2 else x.unsqueeze(-2)
    planes = planes if planes.ndim == 4 else planes.unsqueeze(0)
    if min(pooled_size(planes.shape[2 + axis], window, axis, pool.ceil_mode) for axis in (0, 1)) < 1:
        return None
    run = _MaxPool.apply if keeps else _without_gradient
    y = run(planes, window, pool.ceil_mode)
    y = y if axes == 2 else y.squeeze(-2)
    return y if x.ndim - axes == 2 else y.squeeze(0)


def _without_gradient(x: Tensor, window: tuple[int, ...], ceil_mode: bool) -> Tensor:
    return max_pool_offsets(x, window, ceil_mode)[0]


class LeanMaxPool1d(nn.MaxPool1d):
    """`nn.MaxPool1d` that keeps one byte for each output."""

    def forward(self, input: Tensor) -> Tensor:
        y = _lean_max_pool(self, input, 1)
        return super().forward(input) if y is None else y


class LeanMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` that keeps one byte for each output."""

    def forward(self, input: Tensor) -> Tensor:
        y = _lean_max_pool(self, input, 2)
        return super().forward(input) if y is None else y


class _AveragePool(Function):
    """run(x) for x (N, C, H, W) or (C, H, W), of which the backward formula needs the size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], gradient: Callable[..., Tensor], rest: tuple[Any, ...]
    ) -> Tensor:
        ctx.size, ctx.strides, ctx.gradient, ctx.rest = x.shape, x.stride(), gradient, rest
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient(grad, stand_in(ctx.size, ctx.strides, grad), *ctx.rest), None, None, None


class LeanAvgPool2d(nn.AvgPool2d):
    """`nn.AvgPool2d` that keeps no input."""

    def forward(self, input: Tensor) -> Tensor:
        if not acts_on(input):
            return super().forward(input)
        stride = self.stride if self.stride is not None else self.kernel_size
        sizes = (_pair(self.kernel_size), _pair(stride), _pair(self.padding))
        rest = (*sizes, self.ceil_mode, self.count_include_pad, self.divisor_override)
        return _AveragePool.apply(input, super().forward, torch.ops.aten.avg_pool2d_backward, rest)


class LeanAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` that keeps no input."""

    def forward(self, input: Tensor) -> Tensor:
        # For one output torch takes the mean, which keeps nothing.
        if not acts_on(input) or _pair(self.output_size) == (1, 1):
            return super().forward(input)
        return _AveragePool.apply(input, super().forward, torch.ops.aten._adaptive_avg_pool2d_backward, ())


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool1d: LeanMaxPool1d,
    nn.MaxPool2d: LeanMaxPool2d,
    nn.AvgPool2d: LeanAvgPool2d,
    nn.AdaptiveAvgPool2d: LeanAdaptiveAvgPool2d,
}
