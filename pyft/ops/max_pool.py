"""Max pooling that keeps one byte for each output: which place of its window was the largest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyft.ops.library import LIBRARY, define

define("max_pool_offsets(Tensor x, Tensor(a!) y, int[] window) -> Tensor")
define("max_pool_backward_(Tensor grad, Tensor at, Tensor(a!) dx, int[] window) -> ()")

MOST_PLACES = 256
"""Places of a window that one byte can tell apart."""


def _memory_format(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _pairs(window: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation, each (height, width)."""
    numbers = list(window)
    return numbers[:2], numbers[2:4], numbers[4:6], numbers[6:]


def _flat(x: Tensor) -> Tensor:
    """(numel,) in memory order of a contiguous or channels-last tensor."""
    return x.as_strided((x.numel(),), (1,))


def _starts(out: Sequence[int], window: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row (OH, 1) and column (OW,) of the first place of each window; negative in the padding."""
    _, stride, padding, _ = _pairs(window)
    rows = torch.arange(out[0], device=device) * stride[0] - padding[0]
    columns = torch.arange(out[1], device=device) * stride[1] - padding[1]
    return rows.unsqueeze(1), columns


def max_pool_offsets_reference(x: Tensor, y: Tensor, window: Sequence[int]) -> Tensor:
    """The same as the op in PyTorch, for any dtype and device that torch pools."""
    kernel, stride, padding, dilation = _pairs(window)
    # The output's size is given; torch finds the larger one with ceil_mode where there is one.
    found = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, False)
    if found[0].shape != y.shape:
        found = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, True)
    y.copy_(found[0])
    rows, columns = _starts(y.shape[2:], window, x.device)
    down = (torch.div(found[1], x.shape[3], rounding_mode="floor") - rows).div(dilation[0], rounding_mode="floor")
    across = (found[1] % x.shape[3] - columns).div(dilation[1], rounding_mode="floor")
    at = torch.empty_like(y, dtype=torch.uint8).copy_(down * kernel[1] + across)
    return _flat(at).clone()


def max_pool_backward_reference_(grad: Tensor, at: Tensor, dx: Tensor, window: Sequence[int]) -> None:
    """The same as the op in PyTorch, for any dtype and device that torch pools."""
    kernel, stride, padding, dilation = _pairs(window)
    rows, columns = _starts(grad.shape[2:], window, grad.device)
    places = at.as_strided(grad.shape, grad.stride()).long()
    down = torch.div(places, kernel[1], rounding_mode="floor") * dilation[0] + rows
    indices = down * dx.shape[3] + places % kernel[1] * dilation[1] + columns
    indices = indices.contiguous(memory_format=_memory_format(grad))
    found = torch.ops.aten.max_pool2d_with_indices_backward
    ceil = pooled_size(dx.shape[2], window, 0, False) != grad.shape[2] or (
        pooled_size(dx.shape[3], window, 1, False) != grad.shape[3]
    )
    dx.copy_(found(grad, dx, kernel, stride, padding, dilation, ceil, indices))


def pooled_size(size: int, window: Sequence[int], axis: int, ceil: bool) -> int:
    """Outputs along an axis (0: height, 1: width) of `size` inputs, as torch counts them."""
    kernel, stride, padding, dilation = (pair[axis] for pair in _pairs(window))
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil else 0)) // stride + 1
    # A window that starts in the padding on the right is left out.
    return out - 1 if ceil and (out - 1) * stride >= size + padding else out


def _fake_offsets(x: Tensor, y: Tensor, window: Sequence[int]) -> Tensor:
    return y.new_empty((y.numel(),), dtype=torch.uint8)


def _fake_backward(grad: Tensor, at: Tensor, dx: Tensor, window: Sequence[int]) -> None:
    return None


for _name, _reference, _fake in (
    ("max_pool_offsets", max_pool_offsets_reference, _fake_offsets),
    ("max_pool_backward_", max_pool_backward_reference_, _fake_backward),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyft::{_name}", _fake, lib=LIBRARY)


def fits_core(x: Tensor) -> bool:
    """Whether the compiled kernels take the dtype of `x` on its device, if they are there."""
    # torch adds up gradients of 16 bits in fp32 on CUDA, as the core does, and in 16 bits on the CPU.
    return x.dtype == torch.float32 or (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16))


def _core(x: Tensor) -> bool:
    from pyft.core.loader import load_core_for

    fits = fits_core(x) and x.layout == torch.strided
    return fits and (torch.compiler.is_compiling() or load_core_for(x.device.type) is not None)


def max_pool_offsets(x: Tensor, window: Sequence[int], ceil_mode: bool = False) -> tuple[Tensor, Tensor]:
    """`torch.nn.functional.max_pool2d`, and for each output the place in its window that was the largest.

    Args:
        x: (N, C, H, W), not empty, any dtype and device that torch pools.
        window: kernel, stride, padding and dilation, each (height, width): 8 numbers that torch accepts. At most
            `MOST_PLACES` places.

    Returns:
        The output (N, C, OH, OW), and its places row * kernel width + column as (numel,) uint8, in the order of the
        output's memory. The first of equal values wins, the last NaN wins over all, as in torch.

    >>> max_pool_offsets(torch.tensor([[[[1.0, 5.0], [3.0, 2.0]]]]), (2, 2, 2, 2, 0, 0, 1, 1))
    (tensor([[[[5.]]]]), tensor([1], dtype=torch.uint8))
    """
    format = _memory_format(x)
    x = x.contiguous(memory_format=format)
    size = (*x.shape[:2], *(pooled_size(x.shape[2 + axis], window, axis, ceil_mode) for axis in (0, 1)))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=format)
    call = torch.ops.pyft.max_pool_offsets if _core(x) else max_pool_offsets_reference
    return y, call(x, y, list(window))


def max_pool_backward(grad: Tensor, at: Tensor, size: Sequence[int], window: Sequence[int], last: bool) -> Tensor:
    """The gradient of the input of `max_pool_offsets`.

    Args:
        grad: (N, C, OH, OW).
        at: what `max_pool_offsets` gave.
        size: (N, C, H, W).
        last: whether the output had its channels last in memory.
    """
    format = torch.channels_last if last else torch.contiguous_format
    grad = grad.contiguous(memory_format=format)
    dx = torch.empty(tuple(size), dtype=grad.dtype, device=grad.device, memory_format=format)
    call = torch.ops.pyft.max_pool_backward_ if _core(grad) else max_pool_backward_reference_
    call(grad, at, dx, list(window))
    return dx
