"""Padding of a batch of texts, and whether a model makes anything of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyft.freezing.lean.core_calls import core_calls
from pyft.freezing.lean.token_linear import leaving_out_pays
from pyft.freezing.no_trace import no_trace
from pyft.freezing.prefix_cache_batch import mask_of

_ROUNDING = 1e-4


def padding_mask(inputs: Any) -> Tensor | None:
    """The mask (B, T) of inputs by name, on the CPU, if linear layers could leave out so much padding."""
    mask = mask_of(inputs)
    return mask if mask is not None and mask.is_cpu and leaving_out_pays(mask) else None


def ignores_padding(
    model: nn.Module, mask: Tensor, forward: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]
) -> bool:
    """Whether a model gives the same where nothing is computed for padding in its linear layers.

    Two passes in eval mode that leave no trace. A model that made anything of the padding, say an average over all
    tokens, would give something else: the outputs of its linear layers are zeros there in one of them.

    Args:
        mask: (B, T), 0 for padding.
        forward: gives the logits of the batch, (B, ...); where these are (B, T, ...), those of padding do not count.
        loss: gives the loss of logits.
    """
    # With gradients, as in a step: some modules of torch take another way without.
    with no_trace(model), torch.enable_grad():
        model.eval()
        with core_calls():
            whole = forward().detach()
        with core_calls(mask):
            found = forward().detach()
    same = [(found, whole), (loss(found), loss(whole))]
    if found.shape[: mask.ndim] == mask.shape and found.ndim > mask.ndim:
        same[0] = (found[mask != 0], whole[mask != 0])
    return all(_same(a.detach().double(), b.detach().double()) for a, b in same)


def _same(found: Tensor, wanted: Tensor) -> bool:
    largest = wanted.abs().amax() if wanted.numel() else wanted.sum()
    return bool(((found - wanted).abs() <= _ROUNDING * largest).all())
