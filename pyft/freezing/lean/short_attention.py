"""`F.scaled_dot_product_attention` of short sequences on the CPU, where the core has a kernel that is faster."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyft.freezing.lean.conditions import is_eager, is_float32_on_cpu, refuse_second
from pyft.ops.random_bits import bernoulli_bits
from pyft.ops.short_attention import WIDTH_STEP, short_attention, short_attention_backward

LONGEST, WIDEST = 256, 128
"""Up to so many queries and keys, and numbers in a head, the kernel was measured faster than torch's."""
LEAST_QUERIES = 4
"""Fewer do not pay for turning the keys round."""
LEAST_PRODUCTS, PAIRS_FOR_A_THREAD = 2**19, 4
"""Below so many products in all, or with fewer pairs of sample and head, torch's call is the faster one."""


class _ShortAttention(Function):
    """Keeps query, key, value, a number for each query, and with dropout one bit for each weight."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, on: float,
        scale: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        out, log_sums = short_attention(query, key, value, mask, keep, on, scale, causal)
        ctx.save_for_backward(query, key, value, mask, keep, log_sums)
        ctx.numbers = on, scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second("attention")
        query, key, value, mask, keep, log_sums = ctx.saved_tensors
        on, scale, causal = ctx.numbers
        grads = short_attention_backward(grad, query, key, value, mask, keep, on, scale, causal, log_sums)
        return *grads, None, None, None, None, None


def attend_shortly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None
) -> Tensor | None:
    """Attention by the core, with the draws of torch's dropout; None where it is to be torch's own."""
    if not _fits(query, key, value, mask, p, causal):
        return None
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    keep, on = None, 1.0
    if p > 0.0:
        weights = query.new_empty((*query.shape[:3], key.shape[2]))
        keep, on = bernoulli_bits(weights, 1.0 - p), torch.ones(()).div_(1.0 - p).item()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return _ShortAttention.apply(query, key, value, mask, keep, on, scale, causal)
    return short_attention(query, key, value, mask, keep, on, scale, causal)[0]


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, causal: bool) -> bool:
    from pyft.core.loader import load_core

    return (
        all(_is_operand(t) for t in (query, key, value))
        and key.shape == value.shape
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3]
        and query.shape[3] % WIDTH_STEP == 0
        and query.shape[3] <= WIDEST
        and LEAST_QUERIES <= query.shape[2] <= LONGEST
        and 0 < key.shape[2] <= LONGEST
        and _is_enough(query, key)
        and 0.0 <= p < 1.0
        and not torch.is_autocast_enabled("cpu")
        and (mask is None or (not causal and _is_mask(mask, query, key)))
        # Whoever chose one of torch's kernels by `sdpa_kernel` has it.
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.backends.cuda.math_sdp_enabled()
        and load_core() is not None
    )


def _is_enough(query: Tensor, key: Tensor) -> bool:
    pairs = query.shape[0] * query.shape[1]
    products = query.numel() * key.shape[2]
    return products >= LEAST_PRODUCTS and pairs >= PAIRS_FOR_A_THREAD * torch.get_num_threads()


def _is_operand(x: object) -> bool:
    return is_float32_on_cpu(x) and x.ndim == 4  # type: ignore[attr-defined]


def _is_mask(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether the mask is constant, and broadcasts to the weights."""
    wanted = (*query.shape[:3], key.shape[2])
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    return (
        is_eager(mask)
        and mask.is_cpu
        and mask.dtype in (torch.bool, torch.float32)
        and not mask.requires_grad
        and len(sizes) == 4
        and all(size in (1, full) for size, full in zip(sizes, wanted, strict=True))
    )


def short_attention_call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    """`attend_shortly` with the arguments of `F.scaled_dot_product_attention`."""
    return None if enable_gqa else attend_shortly(query, key, value, attn_mask, dropout_p, is_causal, scale)
