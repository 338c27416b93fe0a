"""Chosen rows of the gradient of a Linear's weight, gathered and multiplied in one go on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pyft.ops.library import LIBRARY, define
from pyft.ops.masked_rows import gather_columns

define(
    "partial_weight_gradient(Tensor grad, Tensor input, Tensor? rows, int row_start, int row_count, bool with_sums) "
    "-> (Tensor, Tensor)"
)


def pick(tensor: Tensor, dim: int, index: Tensor | None, start: int, count: int) -> Tensor:
    """Along `dim`: the places of `index`, or `count` from `start` on (a view), or everything where `start` is -1."""
    if index is not None:
        return tensor.index_select(dim, index)
    return tensor if start < 0 else tensor.narrow(dim, start, count)


def weight_gradient_reference(
    grad: Tensor, input: Tensor, rows: Tensor | None, row_start: int, row_count: int, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """The same as `weight_gradient` in PyTorch, for any real dtype and device."""
    if rows is not None:
        chosen, sums = gather_columns(grad, rows, with_sums)
    else:
        chosen = pick(grad, 1, None, row_start, row_count)
        sums = chosen.sum(0) if with_sums else grad.new_empty(0)
    return chosen.t().mm(input), sums


def _fake(
    grad: Tensor, input: Tensor, rows: Tensor | None, row_start: int, row_count: int, with_sums: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty((row_count, input.shape[1])), grad.new_empty(row_count if with_sums else 0)


LIBRARY.impl("partial_weight_gradient", weight_gradient_reference, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::partial_weight_gradient", _fake, lib=LIBRARY)


def weight_gradient(
    grad: Tensor,
    input: Tensor,
    rows: Tensor | None = None,
    row_start: int = -1,
    row_count: int = 0,
    *,
    with_sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows of the gradient of a Linear's weight, `grad[:, rows].T @ input`, and the sums of these columns of `grad`.

    Args:
        grad: (T, O), the gradient of the output, a token a row.
        input: (T, N).
        rows: (r,) int64; or `row_start`, the first of `row_count` rows side by side; neither: all O rows.
        row_count: r.
        with_sums: whether the sums, the gradient of the bias, are wanted.

    Returns:
        (r, N), and (r,) or nothing.

    >>> weight_gradient(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([1]), row_count=1)[0]
    tensor([[6., 8.]])
    """
    if not _core(grad, input, rows, row_start, row_count):
        return weight_gradient_reference(grad, input, rows, row_start, row_count, with_sums)
    rows = None if rows is None else rows.contiguous()
    return torch.ops.pyft.partial_weight_gradient(grad, input, rows, row_start, row_count, with_sums)


def _core(grad: Tensor, input: Tensor, rows: Tensor | None, row_start: int, row_count: int) -> bool:
    """Whether the compiled kernel takes these, and is faster than a gather and PyTorch's matmul."""
    from pyft.core.loader import load_core

    fits = all(t.is_cpu and t.dtype == torch.float32 and t.stride(1) == 1 for t in (grad, input))
    part = rows is not None or row_start >= 0
    worth = input.shape[1] >= 64 and 0 < row_count <= grad.shape[1] // 2
    return fits and part and worth and (torch.compiler.is_compiling() or load_core() is not None)
