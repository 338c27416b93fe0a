"""Function calls in the code of a model, where there is no module to swap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from pyft.freezing.lean.activations import lean_relu
from pyft.freezing.lean.bit_gradients import drop, dropped
from pyft.freezing.lean.conditions import acts_on, as_autocast, has_kernels, in_checkpoint, is_eager, refuse_second
from pyft.freezing.lean.dropout import lean_dropout
from pyft.freezing.lean.pooling import LeanMaxPool2d
from pyft.freezing.lean.short_attention import attend_shortly


def _widened(x: Tensor) -> Tensor:
    """`x` in the dtype in which torch's math does its products: fp32 for 16 bits, unless the user allowed those."""
    wide = x.element_size() == 2 and not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    return x.float() if wide else x


def _no_autocast(x: Tensor) -> torch.autocast:
    """torch's autocast casts what is given to attention, and nothing inside of it."""
    return torch.autocast(x.device.type, enabled=False)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention weights (..., T, S) before dropout, by the steps of torch's `_scaled_dot_product_attention_math`."""
    root = math.sqrt(abs(scale))
    scores = (_widened(q) * math.copysign(root, scale)).matmul(_widened(k).transpose(-2, -1) * root)
    # A row without any allowed place gives zeros, not NaN.
    return torch._safe_softmax(scores if mask is None else scores.add_(mask), -1)


class _AttentionWithDropout(Function):
    """softmax(q k^T) with dropout, times v. Keeps q, k, v and one bit for each weight; the weights are computed again.

    torch's math keeps three matrices of the size of the weights where there is dropout: two and a mask.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scale: float) -> Tensor:
        with _no_autocast(q):
            kept, bits, ctx.on = drop(_weights(q, k, mask, scale), p)
            y = kept.matmul(_widened(v)).to(q.dtype)
        ctx.save_for_backward(q, k, v, bits, *([] if mask is None else [mask]))
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second("attention with dropout")
        q, k, v, bits, *mask = ctx.saved_tensors
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        bias = mask[0] if mask else None
        dq = dk = dv = None
        with _no_autocast(q):
            with torch.enable_grad():
                q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
                weights = _weights(q, k, bias, ctx.scale)
            grad = grad.to(weights.dtype)
            if need_v:
                dv = dropped(weights.detach(), bits, ctx.on).transpose(-2, -1).matmul(grad).to(v.dtype)
            if need_q or need_k:
                dweights = dropped(grad.matmul(_widened(v).transpose(-2, -1)), bits, ctx.on)
                dq, dk = torch.autograd.grad(weights, [q, k], dweights)
        return dq, dk, dv, None, None, None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    def own() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    tensors = (query, key, value)
    if not enable_gqa:
        short = attend_shortly(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if short is not None:
            return short
    takes_bits = (
        0.0 < dropout_p < 1.0
        and not enable_gqa
        and not (is_causal and attn_mask is not None)
        and any(acts_on(t, attn_mask) for t in tensors)
        and all(_has_heads_of(query, t) for t in tensors)
        and has_kernels(query)
    )
    if not takes_bits:
        return own()
    q, k, v = map(as_autocast, tensors)
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else as_autocast(attn_mask)
    # torch's other kernels keep neither weights nor a mask; what torch refuses, torch shall refuse.
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, scale=scale)
    fits = q.dtype == k.dtype == v.dtype and (mask is None or mask.dtype in (torch.bool, q.dtype))
    if choice != SDPBackend.MATH.value or not fits:
        return own()
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -math.inf)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _AttentionWithDropout.apply(q, k, v, mask, dropout_p, scale)


def _has_heads_of(query: Tensor, x: Tensor) -> bool:
    """Whether `x`, a query, key or value, is a plain tensor that is not repeated over heads or batches of `query`."""
    return (
        is_eager(x)
        and x.layout == torch.strided
        and x.is_floating_point()
        and x.device == query.device
        and x.numel() > 0
        and x.ndim >= 2
        and x.shape[:-2] == query.shape[:-2]
    )


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return lean_dropout(input, p) if training and not inplace else F.dropout(input, p, training, inplace)


def _max_pool2d(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    pool = LeanMaxPool2d(
        **{name: options[name] for name in ("kernel_size", "stride", "padding", "dilation") if name in options},
        return_indices=options.get("return_indices", False),
        ceil_mode=options.get("ceil_mode", False),
    )
    return pool(input)


def _relu_(input: Tensor) -> Tensor:
    return lean_relu(input, True)


_CALLS: dict[Any, Callable[..., Any]] = {
    F.relu: lean_relu,
    torch.relu: lean_relu,
    Tensor.relu: lean_relu,
    torch.relu_: _relu_,
    Tensor.relu_: _relu_,
    F.relu_: _relu_,
    F.dropout: _dropout,
    F.max_pool2d: _max_pool2d,
    F.scaled_dot_product_attention: _attention,
}


class _LeanCalls(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        lean = None if torch.compiler.is_compiling() else _CALLS.get(func)
        return (func if lean is None or in_checkpoint() else lean)(*args, **(kwargs or {}))


def lean_calls() -> TorchFunctionMode:
    """Lean forms for function calls: `F.relu`, `F.dropout`, `F.max_pool2d`, and attention with dropout.

    `pyft.lean` swaps modules; these are calls in the code of a model, of this thread, while the context lasts. Put it
    around the forward pass:

        with pyft.lean_calls():
            loss = model(x).sum()
        loss.backward()

    `F.scaled_dot_product_attention` on the CPU keeps three matrices of the size of its weights where there is dropout;
    here it keeps q, k and v, and one bit for each weight. The draws are torch's. Every call of a torch function takes
    about a microsecond longer. Inside torch.compile and inside gradient checkpoints nothing changes.

    >>> x = torch.ones(8, 8, requires_grad=True) * 1.0
    >>> with lean_calls():
    ...     y = torch.relu(x)
    >>> type(y.grad_fn).__name__
    '_ReluBackward'
    """
    return _LeanCalls()
