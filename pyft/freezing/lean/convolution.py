"""Convolutions with a frozen weight: the gradient of the input needs the weight and the input's size, not the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyft.freezing.lean.conditions import acts_on, as_autocast, stand_in


class _FrozenConvolution(Function):
    """torch's convolution of x (N, C, ...); keeps the weight alone. A bias may train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.size, ctx.strides = geometry, x.shape, x.stride()
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)
        dtype = x.dtype
        return torch.convolution(x, weight.to(dtype), None if bias is None else bias.to(dtype), *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]]
        dx, _, db = torch.ops.aten.convolution_backward(
            grad,
            stand_in(ctx.size, ctx.strides, grad),
            weight.to(grad.dtype),
            None if ctx.bias is None else ctx.bias[0],
            *ctx.geometry,
            mask,
        )
        return dx, None, db if db is None else db.to(ctx.bias[1]), None


def _run(module: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, output_padding: Any) -> Tensor:
    """The convolution of x (N, C, ...) or (C, ...)."""
    x = as_autocast(x)
    geometry = (module.stride, padding, module.dilation, module.transposed, output_padding, module.groups)
    batched = x.ndim == weight.ndim
    y = _FrozenConvolution.apply(x if batched else x.unsqueeze(0), weight, bias, geometry)
    return y if batched else y.squeeze(0)


def _pad_same(module: _ConvNd, x: Tensor) -> tuple[Tensor, list[int]]:
    """padding="same" as torch does it: what cannot be split evenly is added on the right."""
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, [total // 2 for total in totals]


def _fits(module: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch would take this input, so that what is wrong is said by torch."""
    return (
        acts_on(x, weight)
        and x.ndim in (weight.ndim, weight.ndim - 1)
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        and (bias is None or bias.dtype == weight.dtype)
        and x.device == weight.device
        and x.shape[1 - weight.ndim] == module.in_channels
    )


class _LeanConvolution(_ConvNd):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _fits(self, input, weight, bias):
            return super()._conv_forward(input, weight, bias)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = [0] * len(self.kernel_size)
        elif padding == "valid":
            padding = [0] * len(self.kernel_size)
        elif padding == "same":
            input, padding = _pad_same(self, input)
        return _run(self, input, weight, bias, padding, [0] * len(self.kernel_size))


class LeanConv1d(_LeanConvolution, nn.Conv1d):
    """`nn.Conv1d` that keeps no input while its weight is frozen."""


class LeanConv2d(_LeanConvolution, nn.Conv2d):
    """`nn.Conv2d` that keeps no input while its weight is frozen."""


class LeanConv3d(_LeanConvolution, nn.Conv3d):
    """`nn.Conv3d` that keeps no input while its weight is frozen."""


class _LeanTransposed(_ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros" or not _fits(self, input, self.weight, self.bias):
            return super().forward(input, output_size)
        axes = len(self.kernel_size)
        sizes: Any = (self.stride, self.padding, self.kernel_size, axes, self.dilation)
        output_padding = self._output_padding(input, output_size, *sizes)
        return _run(self, input, self.weight, self.bias, self.padding, output_padding)


class LeanConvTranspose1d(_LeanTransposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` that keeps no input while its weight is frozen."""


class LeanConvTranspose2d(_LeanTransposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` that keeps no input while its weight is frozen."""


class LeanConvTranspose3d(_LeanTransposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` that keeps no input while its weight is frozen."""


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: LeanConv1d,
    nn.Conv2d: LeanConv2d,
    nn.Conv3d: LeanConv3d,
    nn.ConvTranspose1d: LeanConvTranspose1d,
    nn.ConvTranspose2d: LeanConvTranspose2d,
    nn.ConvTranspose3d: LeanConvTranspose3d,
}
