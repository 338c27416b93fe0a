"""Storage narrower than fp32 in PyTorch, with the bits of csrc/rounding_math.h. Tensors are flat, in memory order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Elements that share one scale of 8-bit state.
BLOCK = 256
_MASK = 0xFFFFFFFF
_INFINITY = 0x7F800000
# Bits of an fp32 number between two 8-bit codes.
_CODE_SHIFT = 20


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of a tensor from the slowest to the fastest in memory."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda dim: strides[dim], reverse=True)


def flat(tensor: Tensor, order: list[int]) -> Tensor:
    """The elements of a tensor with its dimensions in this order, (numel,); a view where that is possible."""
    return tensor.permute(order).reshape(-1)


def write_flat(tensor: Tensor, order: list[int], value: Tensor) -> None:
    """The reverse: copies `value`, (numel,), into `tensor`, rounding to its dtype."""
    view = tensor.permute(order)
    view.copy_(value.view(view.shape))


def random_key(seed: int, number: int, step: int) -> int:
    """Key of the parameter with this number in this step: SplitMix64's rounds over the three."""
    wide = 0xFFFFFFFFFFFFFFFF
    x = seed & wide
    for value in (number, step, 0):
        x = ((x + 0x9E3779B97F4A7C15) & wide) ^ (value & wide)
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wide
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wide
        x ^= x >> 31
    return x >> 32


def random_bits(key: int, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of `count` places, (count,) int64."""
    place = torch.arange(count, dtype=torch.int64, device=device)
    blocks = (place >> 32) * 0x85EBCA6B
    x = ((place & _MASK) * 0x9E3779B9 + (blocks & _MASK ^ key)) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).to(torch.int64) & _MASK


def _floats(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _bf16(high: Tensor) -> Tensor:
    return torch.where(high >= 1 << 15, high - (1 << 16), high).to(torch.int16).view(torch.bfloat16)


def to_bf16_stochastic(x: Tensor, random16: Tensor) -> Tensor:
    """fp32 to bf16, up with the probability of the part that is cut off (Gupta et al. 2015, section 3.1)."""
    rounded = _bf16(((_bits(x) + random16) & _MASK) >> 16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 to the nearest bf16, ties away from zero, and the int16 rest that makes it exact."""
    bits = _bits(x)
    high = torch.where(x.isnan(), (bits >> 16) | 0x40, ((bits + 0x8000) & _MASK) >> 16)
    low = torch.where(x.isnan(), 0, (bits - (high << 16)))
    return _bf16(high), low.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The reverse of `split`."""
    return _floats((((high.view(torch.int16).to(torch.int64) & 0xFFFF) << 16) + low.to(torch.int64)) & _MASK)


def _per_element(of_blocks: Tensor, count: int) -> Tensor:
    return of_blocks.repeat_interleave(BLOCK)[:count]


def _lowest_bits(scale: Tensor, signed: bool) -> Tensor:
    """Bits of the value of code 0: 16 powers of two below twice the scale, 32 for what is not negative; or 0."""
    return ((_bits(scale) + (1 << 23)) - ((16 if signed else 32) << 23)).clamp(min=0)


def decode_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """8-bit state to fp32.

    Args:
        codes: (n,) int8 for a moment of either sign, uint8 for one that is never negative.
        scale: (ceil(n / 256),) fp32, a power of two above the largest size in each block or just below it, or 0.
    """
    signed = codes.dtype == torch.int8
    wide, lowest = codes.to(torch.int64), _per_element(_lowest_bits(scale, signed), codes.numel())
    value = _floats((wide.abs() << _CODE_SHIFT) + lowest)
    if not signed:
        return value
    return torch.where(wide < 0, -(value - _floats(lowest)), value - _floats(lowest))


def encode_int8(x: Tensor, random: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 (n,) to codes (n,) and scales (ceil(n / 256),), rounded up with the probability of what is cut off.

    A code is a float of 3 bits after the point and 16 (for moments of either sign) or 32 powers of two, relative to the
    largest size of its block; those of either sign go on linearly below.

    Args:
        x: (n,) fp32; not negative unless `signed`.
        random: (n,) int64, 32 random bits each.
        signed: int8 codes, else uint8.
    """
    count = x.numel()
    blocks = -(-count // BLOCK)
    x = torch.where(x.isnan(), math.nan, x)
    sizes = torch.nn.functional.pad(x.abs(), (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    largest = _bits(sizes).amax(1) if blocks else torch.zeros(0, dtype=torch.int64, device=x.device)
    scale = _floats((largest.clamp(max=_INFINITY) + (2 << _CODE_SHIFT)) & _INFINITY)
    lowest = _per_element(_lowest_bits(scale, signed), count)
    bits = _bits(x.abs() + _floats(lowest)) if signed else torch.maximum(_bits(x.abs()), lowest)
    code = (bits - lowest + (random >> (32 - _CODE_SHIFT))) >> _CODE_SHIFT
    if not signed:
        return code.to(torch.uint8), scale
    return torch.where(x.view(torch.int32) < 0, -code, code).to(torch.int8), scale


def block_random_bits(key: int, moment: int, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of `count` elements of a moment, (count,) int64: multiples of the golden ratio from a
    random start for each block."""
    starts = random_bits((key + moment) & _MASK, -(-count // BLOCK), device)
    place = torch.arange(count, dtype=torch.int64, device=device) % BLOCK
    return (starts.repeat_interleave(BLOCK)[:count] + place * 0x9E3779B9) & _MASK
