"""Chosen columns of a matrix side by side, and a compact part written back: kernels on a GPU, PyTorch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from pyft.ops.library import LIBRARY, define

define("gather_columns(Tensor x, Tensor columns, bool with_sums) -> (Tensor, Tensor)")
define("write_part_(Tensor(a!) full, Tensor part, Tensor? rows, Tensor? columns) -> ()")

# The kernels count columns in 32 bits.
_MOST_COLUMNS = 2**31 - 2
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def gather_columns_reference(x: Tensor, columns: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    """The same as the op in PyTorch, for any dtype and device."""
    found = x.index_select(1, columns)
    return found, found.sum(0) if with_sums else x.new_empty(0)


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


def _fake_write(full: Tensor, part: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    return None


LIBRARY.impl("gather_columns", gather_columns_reference, "CompositeExplicitAutograd")
LIBRARY.impl("write_part_", write_part_reference_, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::gather_columns", _fake_gather, lib=LIBRARY)
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
