"""Draws of torch's generator on the CPU as bits, as dropout keeps them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyft.ops.bit_masks import POSITIVE, pack_bits, pack_bits_reference
from pyft.ops.library import LIBRARY, define

define("bernoulli_bits(Tensor(a!) state, int count, float p) -> Tensor")


def bernoulli_bits_reference(state: Tensor, count: int, p: float) -> Tensor:
    """The same as the op in PyTorch: `state` (5056,) uint8 moves on by `count` draws; gives ceil(count / 8) uint8."""
    generator = torch.Generator().set_state(state)
    drawn = torch.empty(count).bernoulli_(p, generator=generator)
    state.copy_(generator.get_state())
    return pack_bits_reference(drawn, POSITIVE)


def _fake(state: Tensor, count: int, p: float) -> Tensor:
    return state.new_empty(((count + 7) // 8,))


LIBRARY.impl("bernoulli_bits", bernoulli_bits_reference, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::bernoulli_bits", _fake, lib=LIBRARY)


def bernoulli_bits(x: Tensor, p: float) -> Tensor:
    """One bit for each element of `x`, set with probability `p`: the draws of `torch.empty_like(x).bernoulli_(p)`, from
    the same generator, which is then where it would be after them.

    Args:
        x: on the CPU, of any real dtype, without gaps in memory.
        p: from 0 to 1.

    Returns:
        ceil(numel / 8) uint8, in the order of the memory of `x`, the first element in the lowest bit.

    >>> bernoulli_bits(torch.empty(3), 1.0)
    tensor([7], dtype=torch.uint8)
    """
    # torch draws for other layouts in an order of its own.
    if not x.is_contiguous() or not x.is_floating_point() or not _draws_are_known():
        return pack_bits(torch.empty_like(x).bernoulli_(p), POSITIVE)
    state = torch.get_rng_state()
    bits = torch.ops.pyft.bernoulli_bits(state, x.numel(), p)
    torch.set_rng_state(state)
    return bits


@functools.cache
def _draws_are_known() -> bool:
    """Whether the core draws what this torch draws: on Intel's processors that has another generator for this."""
    from pyft.core.loader import load_core

    if load_core() is None:
        return False
    for p in (0.9, 0.3):
        ours = torch.Generator().manual_seed(7).get_state()
        torchs = ours.clone()
        bits = torch.ops.pyft.bernoulli_bits(ours, 1999, p)
        if not torch.equal(bits, bernoulli_bits_reference(torchs, 1999, p)) or not torch.equal(ours, torchs):
            return False
    return True
