"""Attention of short sequences on the CPU: all weights of a head stay in a cache, forward and backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyft.ops.bit_masks import unpack_bits
from pyft.ops.library import LIBRARY, define

define(
    "short_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? keep, float on, float scale, "
    "bool causal) -> (Tensor, Tensor)"
)
define(
    "short_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? keep, "
    "float on, float scale, bool causal, Tensor log_sums) -> (Tensor, Tensor, Tensor)"
)

WIDTH_STEP = 16
"""Heads are multiples of so many numbers wide: whole registers of any CPU target."""


def _like_projections(x: Tensor) -> Tensor:
    """(B, H, T, D) in the memory order (B, T, H, D), in which projections read it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = query.matmul(key.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), -math.inf)
    return scores


def _factor(weights: Tensor, keep: Tensor | None, on: float) -> Tensor:
    if keep is None:
        return torch.ones_like(weights)
    like = torch.empty(weights.shape, dtype=weights.dtype, device="meta")
    return unpack_bits(keep, like).to(weights.dtype) * on


def short_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, on: float, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as `short_attention` in PyTorch, for any floating dtype and device."""
    scores = _scores(query, key, mask, scale, causal)
    log_sums = scores.logsumexp(-1)
    nothing = log_sums == -math.inf
    log_sums = log_sums.masked_fill(nothing, math.inf)
    weights = (scores - log_sums.unsqueeze(-1)).exp()
    return _like_projections((weights * _factor(weights, keep, on)).matmul(value)), log_sums


def short_attention_backward_reference(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, on: float,
    scale: float, causal: bool, log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same as `short_attention_backward` in PyTorch, for any floating dtype and device."""
    weights = (_scores(query, key, mask, scale, causal) - log_sums.unsqueeze(-1)).exp()
    factor = _factor(weights, keep, on)
    grads = grad.matmul(value.transpose(-2, -1)) * factor
    scores = weights * (grads - (weights * grads).sum(-1, keepdim=True)) * scale
    return (
        _like_projections(scores.matmul(key)),
        _like_projections(scores.transpose(-2, -1).matmul(query)),
        _like_projections((weights * factor).transpose(-2, -1).matmul(grad)),
    )


def _new_operand(like: Tensor) -> Tensor:
    batch, heads, rows, width = like.shape
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _fake(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _new_operand(query), query.new_empty(query.shape[:3])


def _backward_fake(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, ...]:
    return _new_operand(query), _new_operand(key), _new_operand(value)


LIBRARY.impl("short_attention", short_attention_reference, "CompositeExplicitAutograd")
LIBRARY.impl("short_attention_backward", short_attention_backward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::short_attention", _fake, lib=LIBRARY)
torch.library.register_fake("pyft::short_attention_backward", _backward_fake, lib=LIBRARY)


def _row_by_row(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, on: float, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * query key^T + mask) value, with dropout by given draws; without gradient.

    A number is the same in every batch, with any padding that `mask` forbids, and for any number of threads.

    Args:
        query: (B, H, T, D) float32, D a multiple of 16.
        key, value: (B, H, S, D).
        mask: bool (False forbids) or float32 (added), of a shape that broadcasts to (B, H, T, S); or None.
        keep: ceil(B * H * T * S / 8) uint8, a bit for each weight, as from `bernoulli_bits`; or None: no dropout.
        on: what a kept weight is multiplied by.
        scale: what scores are multiplied by.
        causal: query t sees keys 0 to t.

    Returns:
        (B, H, T, D), 0 where all is forbidden, in the memory order (B, T, H, D); and (B, H, T), the logarithms of the
        sums of exponentials, infinite where all is forbidden.

    >>> x = torch.zeros(1, 1, 2, 16)
    >>> short_attention(x, x, x + 1, None, None, 1.0, 0.25, False)[0].unique()
    tensor([1.])
    """
    query, key, value = map(_row_by_row, (query, key, value))
    return torch.ops.pyft.short_attention(query, key, value, _expanded(mask, query, key), keep, on, scale, causal)


def short_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, on: float,
    scale: float, causal: bool, log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, from that of what `short_attention` gave and its `log_sums`; the other
    arguments as there."""
    grad, query, key, value = map(_row_by_row, (grad, query, key, value))
    mask = _expanded(mask, query, key)
    return torch.ops.pyft.short_attention_backward(grad, query, key, value, mask, keep, on, scale, causal, log_sums)


def _expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
