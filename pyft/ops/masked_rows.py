"""Chosen columns of a matrix, or channels of images, and a part written back: kernels on a GPU, PyTorch elsewhere."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pyft.ops.library import LIBRARY, define

define("gather_columns(Tensor x, Tensor columns, bool with_sums) -> (Tensor, Tensor)")
define("gather_planes(Tensor x, Tensor channels, bool with_sums) -> (Tensor, Tensor)")
define("write_part_(Tensor(a!) full, Tensor part, Tensor? rows, Tensor? columns) -> ()")

# The kernels count columns in 32 bits.
_MOST_COLUMNS = 2**31 - 2
# Theirs of planes, too, and pieces of 32 elements.
_MOST_PLANE_ELEMENTS = 32 * (2**31 - 2)
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def gather_columns_reference(x: Tensor, columns: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    """The same as the op in PyTorch, for any dtype and device."""
    found = x.index_select(1, columns)
    return found, found.sum(0) if with_sums else x.new_empty(0)


def gather_planes_reference(x: Tensor, channels: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    """The same as the op in PyTorch, for any dtype, device and number of dimensions."""
    found = x.index_select(1, channels)
    return found, found.sum([0, *range(2, x.ndim)]) if with_sums else x.new_empty(0)


def write_part_reference_(full: Tensor, part: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """The same as the op in PyTorch, for any dtype and device."""
    if rows is not None and columns is not None:
        full.index_put_((rows[:, None], columns), part)
    elif rows is not None:
        full.index_copy_(0, rows, part)
    elif columns is not None:
        full.index_copy_(1, columns, part)
    else:
        full.copy_(part)


def _fake_gather(x: Tensor, columns: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    count = columns.shape[0]
    return x.new_empty((x.shape[0], count)), x.new_empty(count if with_sums else 0)


def _fake_planes(x: Tensor, channels: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    count = channels.shape[0]
    return x.new_empty((x.shape[0], count, x.shape[2])), x.new_empty(count if with_sums else 0)


def _fake_write(full: Tensor, part: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    return None


LIBRARY.impl("gather_columns", gather_columns_reference, "CompositeExplicitAutograd")
LIBRARY.impl("gather_planes", gather_planes_reference, "CompositeExplicitAutograd")
LIBRARY.impl("write_part_", write_part_reference_, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::gather_columns", _fake_gather, lib=LIBRARY)
torch.library.register_fake("pyft::gather_planes", _fake_planes, lib=LIBRARY)
torch.library.register_fake("pyft::write_part_", _fake_write, lib=LIBRARY)


def _core(x: Tensor) -> bool:
    """Whether the compiled kernels take matrices like `x`. On the CPU PyTorch's own are as good."""
    from pyft.core.loader import load_core_for

    fits = x.device.type == "cuda" and x.dtype in _FORMATS and x.layout == torch.strided
    return fits and (torch.compiler.is_compiling() or load_core_for("cuda") is not None)


def gather_columns(x: Tensor, columns: Tensor, with_sums: bool = False) -> tuple[Tensor, Tensor]:
    """`x[:, columns]`, contiguous, and with it the sum of each of these columns, on a GPU in one pass.

    Args:
        x: (T, O), any strides, dtype and device.
        columns: (r,) int64 on the device of `x`, each in [0, O). They are not checked: that would wait for the GPU.
        with_sums: whether the sums are wanted.

    Returns:
        (T, r), and (r,) sums in the dtype of `x`, taken in fp32 or wider; (0,) where they are not wanted. A GPU gives
        the same bits in every call. Not differentiable.

    >>> gather_columns(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([2, 0]), with_sums=True)
    (tensor([[3., 1.],
            [6., 4.]]), tensor([9., 5.]))
    """
    if _core(x) and x.shape[1] <= _MOST_COLUMNS:
        return torch.ops.pyft.gather_columns(x, columns.contiguous(), with_sums)
    return gather_columns_reference(x, columns, with_sums)


def gather_channels(x: Tensor, channels: Tensor, with_sums: bool = False) -> tuple[Tensor, Tensor]:
    """`x[:, channels]` of images, and with it the sum of each of these channels, on a GPU in one pass.

    Args:
        x: (N, C, ...), any strides, dtype and device.
        channels: (r,) int64 on the device of `x`, each in [0, C). Not checked.
        with_sums: whether the sums are wanted.

    Returns:
        (N, r, ...), channels last where those of `x` lie side by side in memory, else contiguous; and sums as
        `gather_columns` gives them.

    >>> gather_channels(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([1]), with_sums=True)
    (tensor([[[3., 4.]]]), tensor([7.]))
    """
    flat = _channels_last(x)
    if flat is not None:
        found, sums = gather_columns(flat, channels, with_sums)
        return found.reshape(x.shape[0], *x.shape[2:], channels.shape[0]).movedim(-1, 1), sums
    planes = _planes(x) if _core(x) else None
    if planes is None:
        return gather_planes_reference(x, channels, with_sums)
    found, sums = torch.ops.pyft.gather_planes(planes, channels.contiguous(), with_sums)
    return found.reshape(x.shape[0], channels.shape[0], *x.shape[2:]), sums


def _channels_last(x: Tensor) -> Tensor | None:
    """The memory of `x` as (places, channels), or None where channels are no neighbours there."""
    count = x.shape[1]
    step = _one_step([(x.stride(d), x.shape[d]) for d in range(x.ndim) if d != 1])
    if x.stride(1) != 1 or count < 2 or step is None:
        return None
    return x.as_strided((x.numel() // count, count), (step, 1))


def _planes(x: Tensor) -> Tensor | None:
    """The memory of `x` as (images, channels, places), or None where the places of a channel are not one run."""
    size = x.shape[2:].numel()
    if x.numel() > _MOST_PLANE_ELEMENTS or x.shape[0] * x.shape[1] > _MOST_COLUMNS:
        return None
    if size > 1 and _one_step([(x.stride(d), x.shape[d]) for d in range(2, x.ndim)]) != 1:
        return None
    return x.as_strided((x.shape[0], x.shape[1], size), (x.stride(0), x.stride(1), 1))


def _one_step(dims: list[tuple[int, int]]) -> int | None:
    """From one place to the next through all of these (stride, size), the last the fastest; None where it varies."""
    dims = [dim for dim in dims if dim[1] != 1]
    if any(outer != inner * size for (outer, _), (inner, size) in pairwise(dims)):
        return None
    return dims[-1][0] if dims else 1


def write_part_(full: Tensor, part: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """`full[rows[:, None], columns] = part`; None stands for all rows or all columns.

    Args:
        full: (O, K, ...), written in place. Any strides, dtype and device.
        part: (r, c, ...) in the dtype and on the device of `full`.
        rows: (r,) int64 on the device of `full`, each in [0, O) and once. Not checked.
        columns: (c,) int64, the same for K.

    >>> full = torch.zeros(2, 3)
    >>> write_part_(full, torch.ones(1, 2), torch.tensor([1]), torch.tensor([0, 2]))
    >>> full
    tensor([[0., 0., 0.],
            [1., 0., 1.]])
    """
    flat = _as_matrices(full, part, columns) if _core(full) and part.dtype == full.dtype else None
    if flat is None:
        write_part_reference_(full, part, rows, columns)
        return
    rows, columns = (None if index is None else index.contiguous() for index in (rows, columns))
    torch.ops.pyft.write_part_(*flat, rows, columns)
    # Raw writes are unseen by autograd: without this a saved, now stale value is used in silence.
    if not full.is_inference():
        torch.autograd.graph.increment_version([full])


def _as_matrices(full: Tensor, part: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both as matrices over the same memory, or None where a row is not one run of elements in both."""
    if full.ndim == 2:
        return (full, part) if full.shape[1] <= _MOST_COLUMNS else None
    if columns is not None and full.shape[2:].numel() != 1:
        return None
    if full.ndim == 1:
        return full.unsqueeze(1), part.unsqueeze(1)
    one, other = full[0], part[:1].squeeze(0)
    runs = [_is_one_run(one), part.shape[0] == 0 or _is_one_run(other)]
    if not all(runs) or _order(one) != _order(other):
        return None
    length = one.numel()
    if length > _MOST_COLUMNS:
        return None
    return (
        full.as_strided((full.shape[0], length), (full.stride(0), 1)),
        part.as_strided((part.shape[0], length), (part.stride(0), 1)),
    )


def _is_one_run(x: Tensor) -> bool:
    """Whether the elements fill memory without a gap and without overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return x.numel() > 0


def _order(x: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have more than one place."""
    return tuple(s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1)
