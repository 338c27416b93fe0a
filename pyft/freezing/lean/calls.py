"""Function calls in the code of a model, where there is no module to swap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from pyft.freezing.lean.activations import lean_relu
from pyft.freezing.lean.bit_gradients import dropped, keep_draws
from pyft.freezing.lean.conditions import acts_on, refuse_second
from pyft.freezing.lean.dropout import lean_dropout
from pyft.freezing.lean.pooling import LeanMaxPool2d


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention weights (..., T, S) before dropout, by the steps of torch's `_scaled_dot_product_attention_math`."""
    root = math.sqrt(scale)
    scores = (q * root).matmul(k.transpose(-2, -1) * root)
    if mask is None:
        return scores.softmax(-1)
    # A row without any allowed place gives zeros, not NaN.
    return torch._safe_softmax(scores + mask, -1)


class _AttentionWithDropout(Function):
    """softmax(q k^T) with dropout, times v. Keeps q, k, v and one bit for each weight; the weights are computed again.

    torch keeps three matrices of the size of the weights where there is dropout.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scale: float) -> Tensor:
        weights = _scores(q, k, mask, scale)
        bits, ctx.on = keep_draws(weights, p)
        ctx.save_for_backward(q, k, v, bits, *([] if mask is None else [mask]))
        ctx.scale = scale
        return dropped(weights, bits, ctx.on).matmul(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second("attention with dropout")
        q, k, v, bits, *mask = ctx.saved_tensors
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        bias = mask[0] if mask else None
        dq = dk = dv = None
        with torch.enable_grad():
            q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
            weights = _scores(q, k, bias, ctx.scale)
        if need_v:
            dv = dropped(weights.detach(), bits, ctx.on).transpose(-2, -1).matmul(grad)
        if need_q or need_k:
            dweights = dropped(grad.matmul(v.transpose(-2, -1)), bits, ctx.on)
            dq, dk = torch.autograd.grad(weights, [q, k], dweights)
        return dq, dk, dv, None, None, None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    tensors = (query, key, value)
    own = (
        not 0.0 < dropout_p < 1.0
        or enable_gqa
        or not any(acts_on(t, attn_mask) for t in tensors)
        or not all(t.is_cpu and t.dtype == torch.float32 and t.ndim == query.ndim for t in tensors)
        or torch.is_autocast_enabled("cpu")
        or not query.numel()
        or not key.numel()
        or any(t.shape[:-2] != query.shape[:-2] for t in tensors)
    )
    if own or (is_causal and attn_mask is not None):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _AttentionWithDropout.apply(query, key, value, attn_mask, dropout_p, scale)


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
        return (func if lean is None or _in_checkpoint() else lean)(*args, **(kwargs or {}))


def _in_checkpoint() -> bool:
    """Whether what is kept now is dropped again: a checkpoint repeats its part in backward, where torch has no modes,
    and both times must be alike."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


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
