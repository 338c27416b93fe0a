"""Norms with frozen affine parameters.

BatchNorm in eval mode is a scale and a shift for each channel: its gradient needs the scale alone. torch's LayerNorm
and GroupNorm keep their input once, with mean and deviation, and compute no gradient of a frozen weight: there is
nothing to take away. RMSNorm in a 16-bit dtype keeps its input in fp32, but where CUDA has one kernel for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from pyft.freezing.lean.activations import LeanReLU, computed_again
from pyft.freezing.lean.bit_gradients import gradient_by_bits, keep_bits
from pyft.freezing.lean.conditions import acts_on, has_kernels
from pyft.ops.bit_masks import affine_relu_bits, mask_channels


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


def channel_scale(norm: _BatchNorm) -> Tensor:
    """The scale (C,) that a BatchNorm in eval mode applies to each channel."""
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else scale * norm.weight.detach()


def channel_shift(norm: _BatchNorm, scale: Tensor) -> Tensor:
    """What it adds (C,)."""
    assert norm.running_mean is not None
    shift = -norm.running_mean * scale
    return shift if norm.bias is None else shift + norm.bias.detach()


class _FrozenBatchNorm(Function):
    """torch's output for x (N, C, ...); keeps the scale (C,) alone. A bias may train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, norm: _BatchNorm) -> Tensor:
        ctx.save_for_backward(channel_scale(norm))
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, bias, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        db = None
        if ctx.needs_input_grad[1]:
            db = grad.sum([0, *range(2, grad.ndim)], dtype=ctx.bias_dtype)
        scale = _per_channel(scale, grad)
        if torch.is_grad_enabled() or grad.dtype == scale.dtype:
            return (grad * scale).to(grad.dtype), db, None
        # The same roundings, without a product in the wider dtype that is written and read again.
        return torch.mul(grad, scale, out=torch.empty_like(grad)), db, None


class _FrozenBatchNormRelu(Function):
    """max(x * scale + shift, 0) for x (N, C, ...) in one pass; keeps the scale and one bit for each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y, bits = affine_relu_bits(x, scale, shift)
        keep_bits(ctx, y, bits, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gradient_by_bits(ctx, grad, mask_channels, ctx.saved_tensors[1]), None, None


def _is_affine(norm: _BatchNorm, x: Tensor) -> bool:
    """Whether the norm is now a scale and a shift that do not train."""
    eval_statistics = not norm.training and norm.running_mean is not None and norm.running_var is not None
    return eval_statistics and acts_on(x, norm.weight) and x.ndim >= 2 and x.shape[1] == norm.num_features


class _LeanBatchNorm(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not _is_affine(self, input):
            return super().forward(input)
        self._check_input_dim(input)
        return _FrozenBatchNorm.apply(input, self.bias, self)


class LeanBatchNorm1d(_LeanBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that in eval mode keeps a scale for each channel while its weight is frozen."""


class LeanBatchNorm2d(_LeanBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that in eval mode keeps a scale for each channel while its weight is frozen."""


class LeanBatchNorm3d(_LeanBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that in eval mode keeps a scale for each channel while its weight is frozen."""


def has_one_rms_norm(x: Tensor, weight: Tensor | None) -> bool:
    """Whether torch norms `x` by one kernel, which keeps `x` as it is: on CUDA, in one dtype, without autocast."""
    fits = x.is_contiguous() and (weight is None or weight.dtype == x.dtype)
    return x.is_cuda and fits and not torch.is_autocast_enabled("cuda")


class LeanRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` that in a 16-bit dtype keeps its input as it is, and no copy of it in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        if not acts_on(x, self.weight) or x.element_size() != 2 or has_one_rms_norm(x, self.weight):
            return super().forward(x)
        return computed_again(x, super().forward)


def _norm_and_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor | None:
    """Both as one pass, where that is what calling one after the other would give; else None."""
    if not (isinstance(norm, _LeanBatchNorm) and type(relu) is LeanReLU and _is_affine(norm, x)):
        return None
    if norm.bias is not None and norm.bias.requires_grad:
        return None
    if x.dtype != torch.float32 or not x.numel() or _is_watched(norm) or _is_watched(relu) or not has_kernels(x):
        return None
    norm._check_input_dim(x)
    scale = channel_scale(norm).float()
    return _FrozenBatchNormRelu.apply(x, scale, channel_shift(norm, scale).float())


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody's hook would see the module's input or output."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class LeanSequential(nn.Sequential):
    """`nn.Sequential` that runs a frozen BatchNorm and the ReLU after it in one pass."""

    def forward(self, input: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _has_any_global_hook():
            return super().forward(input)
        modules = list(self)
        at = 0
        while at < len(modules):
            both = None
            if at + 1 < len(modules) and isinstance(modules[at], _LeanBatchNorm) and type(input) is Tensor:
                both = _norm_and_relu(modules[at], modules[at + 1], input)
            input = modules[at](input) if both is None else both
            at += 1 if both is None else 2
        return input


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: LeanBatchNorm1d,
    nn.BatchNorm2d: LeanBatchNorm2d,
    nn.BatchNorm3d: LeanBatchNorm3d,
    nn.RMSNorm: LeanRMSNorm,
}
