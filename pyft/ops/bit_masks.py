"""Activations that keep one bit for each element for their backward pass, and what is done with those bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyft.ops.library import LIBRARY, define

define("relu_bits(Tensor x) -> (Tensor, Tensor)")
define("relu_bits_(Tensor(a!) x) -> Tensor")
define("pack_bits(Tensor x, int test, float low=0.0, float high=0.0) -> Tensor")
define("pack_bools(Tensor x) -> Tensor")
define("mask_by_bits(Tensor x, Tensor bits, float off=0.0) -> Tensor")
define("scale_by_bits(Tensor x, Tensor bits, float on) -> Tensor")
define("affine_relu_bits(Tensor x, Tensor scale, Tensor shift) -> (Tensor, Tensor)")
define("mask_channels(Tensor x, Tensor bits, Tensor scale) -> Tensor")

# Tests of `pack_bits`, as in csrc/bit_masks_cpu.h.
RELU, POSITIVE, INSIDE, NOT_OUTSIDE = 0, 1, 2, 3
_FP32_ONLY = (torch.float32,)
_CORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BOOL_ONLY = (torch.bool,)


def gap_free(x: Tensor) -> Tensor:
    """`x`, or a copy of it whose elements fill their memory without gaps, so that memory order means something."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x if torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()


def _in_memory_order(x: Tensor) -> Tensor:
    """The elements of a gap-free tensor as (numel,) in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))


def _pack(passes: Tensor) -> Tensor:
    """bool, gap-free, to ceil(numel / 8) uint8."""
    flat = _in_memory_order(passes)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=passes.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """The bits as a bool tensor with the shape and strides of the gap-free tensor `like`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits.unsqueeze(1) >> places) & 1).bool().reshape(-1)[: like.numel()]
    return flat.as_strided(like.shape, like.stride())


def _passes(x: Tensor, test: int, low: float, high: float) -> Tensor:
    if test == RELU:
        return ~(x <= 0)
    if test == POSITIVE:
        return x > 0
    return (x > low) & (x < high) if test == INSIDE else ~((x <= low) | (x >= high))


def pack_bits_reference(x: Tensor, test: int, low: float = 0.0, high: float = 0.0) -> Tensor:
    """The same as `pack_bits` in PyTorch, for any real dtype, device and gap-free layout."""
    return _pack(_passes(x, test, low, high))


def pack_bools_reference(x: Tensor) -> Tensor:
    """The same as `pack_bools` in PyTorch, for any device and gap-free layout."""
    return _pack(x)


def relu_bits_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `relu_bits` in PyTorch, for any real dtype, device and gap-free layout."""
    y = torch.relu(x)
    return y, pack_bits_reference(y, RELU)


def relu_bits_reference_(x: Tensor) -> Tensor:
    """The same as `relu_bits_` in PyTorch, for any real dtype, device and gap-free layout."""
    x.relu_()
    return pack_bits_reference(x, RELU)


def mask_by_bits_reference(x: Tensor, bits: Tensor, off: float = 0.0) -> Tensor:
    """The same as `mask_by_bits` in PyTorch, for any real dtype, device and gap-free layout."""
    return torch.where(unpack_bits(bits, x), x, x * off if off else torch.zeros((), dtype=x.dtype, device=x.device))


def scale_by_bits_reference(x: Tensor, bits: Tensor, on: float) -> Tensor:
    """The same as `scale_by_bits` in PyTorch, for any real dtype, device and gap-free layout."""
    return torch.where(unpack_bits(bits, x), x * on, x * 0.0)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


def affine_relu_bits_reference(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `affine_relu_bits` in PyTorch, for any real dtype, device and gap-free layout."""
    return relu_bits_reference(x * _per_channel(scale, x).to(x.dtype) + _per_channel(shift, x).to(x.dtype))


def mask_channels_reference(x: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    """The same as `mask_channels` in PyTorch, for any real dtype, device and gap-free layout."""
    return mask_by_bits_reference(x * _per_channel(scale, x).to(x.dtype), bits)


def _bits_for(x: Tensor) -> Tensor:
    return x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


def _fake_pair(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _bits_for(x)


def _fake_bits(x: Tensor, *_: object, **__: object) -> Tensor:
    return _bits_for(x)


def _fake_same(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x)


for _name, _reference, _fake in (
    ("relu_bits", relu_bits_reference, _fake_pair),
    ("relu_bits_", relu_bits_reference_, _fake_bits),
    ("pack_bits", pack_bits_reference, _fake_bits),
    ("pack_bools", pack_bools_reference, _fake_bits),
    ("mask_by_bits", mask_by_bits_reference, _fake_same),
    ("scale_by_bits", scale_by_bits_reference, _fake_same),
    ("affine_relu_bits", affine_relu_bits_reference, _fake_pair),
    ("mask_channels", mask_channels_reference, _fake_same),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyft::{_name}", _fake, lib=LIBRARY)


def _core(x: Tensor, dtypes: tuple[torch.dtype, ...] = _CORE_DTYPES) -> bool:
    """Whether the compiled kernels take `x`, which has no gaps."""
    from pyft.core.loader import load_core_for

    fits = x.layout == torch.strided and x.dtype in dtypes
    return fits and (torch.compiler.is_compiling() or load_core_for(x.device.type) is not None)


def relu_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """max(x, 0), and one bit for each element: whether the gradient goes through (`torch.relu`: output <= 0 stops it).

    Args:
        x: any shape, real dtype and device.

    Returns:
        The output, with the strides of `x` where that has no gaps, and ceil(numel / 8) uint8, in the order of the
        output's memory, the first element in the lowest bit. NaN goes through.

    >>> relu_bits(torch.tensor([-1.0, 2.0, 0.0, 3.0]))
    (tensor([0., 2., 0., 3.]), tensor([10], dtype=torch.uint8))
    """
    x = gap_free(x)
    return torch.ops.pyft.relu_bits(x) if _core(x) else relu_bits_reference(x)


def relu_bits_(x: Tensor) -> Tensor:
    """`relu_bits` in place; gives the bits.

    Raises:
        ValueError: `x` has gaps in memory, so that its elements have no order there.
    """
    if gap_free(x) is not x:
        raise ValueError(f"x has strides {x.stride()} with gaps or overlaps; use relu_bits, or clone() it first")
    if not _core(x):
        return relu_bits_reference_(x)
    bits = torch.ops.pyft.relu_bits_(x)
    # Raw writes are unseen by autograd: without this a saved, now stale value is used in silence.
    if not x.is_inference():
        torch.autograd.graph.increment_version([x])
    return bits


def pack_bits(x: Tensor, test: int, low: float = 0.0, high: float = 0.0) -> Tensor:
    """One bit for each element of `x`, packed as by `relu_bits`.

    Args:
        x: any shape, real dtype and device, without gaps in memory (see `gap_free`).
        test: RELU: not x <= 0; POSITIVE: x > 0; INSIDE: low < x < high; NOT_OUTSIDE: neither x <= low nor x >= high.
            NaN passes the first and the last.
    """
    return torch.ops.pyft.pack_bits(x, test, low, high) if _core(x) else pack_bits_reference(x, test, low, high)


def pack_bools(x: Tensor) -> Tensor:
    """One bit for each element of a bool tensor, packed as by `relu_bits`.

    Args:
        x: bool, any shape, without gaps in memory (see `gap_free`).

    >>> pack_bools(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    return torch.ops.pyft.pack_bools(x) if _core(x, _BOOL_ONLY) else pack_bools_reference(x)


def mask_by_bits(x: Tensor, bits: Tensor, off: float = 0.0) -> Tensor:
    """`x` where its bit is set, elsewhere x * off; for off = 0 that is 0, whatever x is.

    Args:
        x: gap-free, in the memory order in which `bits` were packed.

    >>> mask_by_bits(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([2], dtype=torch.uint8))
    tensor([0., 2., 0.])
    """
    return torch.ops.pyft.mask_by_bits(x, bits, off) if _core(x) else mask_by_bits_reference(x, bits, off)


def scale_by_bits(x: Tensor, bits: Tensor, on: float) -> Tensor:
    """x * on where its bit is set, elsewhere x * 0. Arguments as in `mask_by_bits`."""
    # Where fp32 does not hold `on`, or x is double, torch's own product is the right one.
    return torch.ops.pyft.scale_by_bits(x, bits, on) if _core(x) else scale_by_bits_reference(x, bits, on)


def affine_relu_bits(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`relu_bits` of x * scale + shift, in one pass.

    Args:
        x: (N, C, ...).
        scale, shift: (C,), of the dtype of `x` or wider.
    """
    x = gap_free(x)
    if _core(x, _FP32_ONLY) and channels_in_order(x):
        return torch.ops.pyft.affine_relu_bits(x, scale, shift)
    return affine_relu_bits_reference(x, scale, shift)


def mask_channels(x: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    """x * scale where its bit is set, elsewhere 0; the backward pass of `affine_relu_bits`.

    Args:
        x: (N, C, ...), gap-free, in the memory order in which `bits` were packed.
        scale: (C,).
    """
    if _core(x, _FP32_ONLY) and channels_in_order(x):
        return torch.ops.pyft.mask_channels(x, bits, scale)
    return mask_channels_reference(x, bits, scale)


def channels_in_order(x: Tensor) -> bool:
    """Whether a gap-free (N, C, ...) is contiguous or has its channels last in memory, which the core needs."""
    if x.is_contiguous():
        return True
    return x.stride(1) == 1 and (x.shape[0] == 1 or x.stride(0) == math.prod(x.shape[1:]))
