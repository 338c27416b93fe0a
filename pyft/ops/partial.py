"""Layers of whose weight a part trains: forward with the whole weight, the weight's gradient for the part only.

Each forward op gets the whole weight, which needs no gradient, and beside it the part, whose values it does not read:
the gradient goes there. The chosen rows of the output's gradient times the chosen columns of the input is all the work
there is; docs/masked_backprop.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyft.ops.library import LIBRARY, define
from pyft.ops.masked_rows import gather_columns
from pyft.ops.weight_gradient import pick, weight_gradient

define(
    "partial_linear(Tensor input, Tensor weight, Tensor? bias, Tensor weight_part, Tensor? bias_part, Tensor? rows, "
    "int row_start, Tensor? columns, Tensor? blocks, int[] block_size) -> Tensor"
)
define(
    "partial_linear_backward(Tensor grad, Tensor kept, Tensor? weight, Tensor? rows, int row_start, int row_count, "
    "Tensor? blocks, int[] block_size, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
define(
    "partial_embedding(Tensor weight, Tensor indices, Tensor weight_part, Tensor places, Tensor? columns, "
    "bool scale_grad_by_freq) -> Tensor"
)
define(
    "partial_embedding_backward(Tensor grad, Tensor indices, Tensor places, Tensor? columns, int row_count, "
    "bool scale_grad_by_freq) -> Tensor"
)


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast makes of the arguments of a matmul or convolution, where it is on."""
    first = tensors[0]
    assert first is not None
    kind = first.device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def nothing(grad: Tensor) -> list[Tensor]:
    """Four empty tensors, which stand for gradients that nobody wants: an op may not give the same one twice."""
    return [grad.new_empty(0) for _ in range(4)]


# ---------------------------------------------------------------- linear


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, *part: object) -> Tensor:
    return F.linear(input, weight, bias)


def _linear_backward(
    grad: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    rows: Tensor | None,
    row_start: int,
    row_count: int,
    blocks: Tensor | None,
    block_size: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input, grad_bias, part, bias_part = nothing(grad)
    flat = grad.reshape(-1, grad.shape[-1])
    if wanted[0] and weight is not None:
        grad_input = grad.matmul(weight)
    if wanted[1]:
        grad_bias = flat.sum(0)
    if wanted[2] and blocks is not None:
        part = _block_gradients(flat, kept.reshape(-1, kept.shape[-1]), blocks, block_size)
    elif wanted[2]:
        part, sums = weight_gradient(
            flat, kept.reshape(-1, kept.shape[-1]), rows, row_start, row_count, with_sums=wanted[3]
        )
        bias_part = sums if wanted[3] else bias_part
    elif wanted[3]:
        bias_part = pick(flat, 1, rows, row_start, row_count).sum(0)
    return grad_input, grad_bias, part, bias_part


def _block_gradients(grad: Tensor, kept: Tensor, blocks: Tensor, block_size: Sequence[int]) -> Tensor:
    """(blocks * height, width): all blocks in one batched matmul."""
    height, width = block_size
    down = grad.reshape(len(grad), -1, height).index_select(1, blocks[:, 0])
    along = kept.reshape(len(kept), -1, width).index_select(1, blocks[:, 1])
    return torch.bmm(down.permute(1, 2, 0), along.transpose(0, 1)).reshape(-1, width)


def _linear_backward_fake(
    grad: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    rows: Tensor | None,
    row_start: int,
    row_count: int,
    blocks: Tensor | None,
    block_size: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = kept.shape[-1] if blocks is None else block_size[1]
    return (
        grad.new_empty((*grad.shape[:-1], weight.shape[1]) if wanted[0] and weight is not None else 0),
        grad.new_empty(grad.shape[-1] if wanted[1] else 0),
        grad.new_empty((row_count, width) if wanted[2] else 0),
        grad.new_empty(row_count if wanted[3] else 0),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, weight_part, bias_part, rows, row_start, columns, blocks, block_size = inputs
    needs = ctx.needs_input_grad
    kept = input if columns is None or not needs[3] else _chosen_columns(input, columns)
    # Where the weight needs no gradient its input is not kept.
    kept = kept if needs[3] else input.new_empty((0, 1))
    ctx.save_for_backward(kept, weight if needs[0] else None, rows, blocks)
    ctx.row_start, ctx.row_count, ctx.block_size = row_start, weight_part.shape[0], block_size
    ctx.dtypes = (weight_part.dtype, None if bias_part is None else bias_part.dtype)


def _chosen_columns(input: Tensor, columns: Tensor) -> Tensor:
    """(..., c) of an input (..., K)."""
    if input.ndim < 2:
        return input.index_select(-1, columns)
    flat = gather_columns(input.detach().reshape(-1, input.shape[-1]), columns)[0]
    return flat.reshape(*input.shape[:-1], len(columns))


def _linear_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, rows, blocks = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    found = torch.ops.pyft.partial_linear_backward(
        grad, kept, weight, rows, ctx.row_start, ctx.row_count, blocks, ctx.block_size, wanted
    )
    given: list[Tensor | None] = [g if want else None for g, want in zip(found, wanted, strict=True)]
    input, bias, part, bias_part = given
    return input, None, bias, as_dtype(part, ctx.dtypes[0]), as_dtype(bias_part, ctx.dtypes[1]), *[None] * 5


def as_dtype(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient in the dtype of what it belongs to; under autocast it comes in another."""
    return grad if grad is None or dtype is None else grad.to(dtype)


def refuse_second_backward(layer: str) -> Callable[..., None]:
    """A backward formula that refuses, by the name of the layer."""

    def refuse(ctx: Any, *grads: object) -> None:
        raise RuntimeError(
            f"pyft: a {layer} layer that trains in part has no second derivative: release the plan "
            "(plan.release(model)) for gradients of gradients"
        )

    return refuse


def partial_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_part: Tensor,
    bias_part: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    row_start: int = -1,
    columns: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: Sequence[int] = (1, 1),
) -> Tensor:
    """`F.linear(input, weight, bias)`, of which only a part of `weight` has a gradient.

    Args:
        input: (..., K), as in `F.linear`, or (K,). Of it, backward keeps the chosen columns.
        weight: (O, K), with the values of the part in their places. It gets no gradient.
        bias: (O,) or None; gets a gradient where it requires one.
        weight_part: (r, c), or (k * height, width) for blocks. Not read; gets the gradient of those entries of weight.
        bias_part: (r,), not read; gets the gradient of these rows of bias.
        rows: (r,) int64; or `row_start`, the first of r rows side by side; neither: all O rows.
        columns: (c,) int64, or None for all K.
        blocks: (k, 2) int64, row and column of each block, the column counted in the chosen `columns`.
        block_size: (height, width) of a block.

    Returns:
        (..., O). A second derivative is refused with a RuntimeError.

    >>> weight, x = torch.eye(3), torch.tensor([[1.0, 2.0, 3.0]])
    >>> part = torch.zeros(1, 3, requires_grad=True)
    >>> partial_linear(x, weight, None, part, row_start=1).sum().backward()
    >>> part.grad
    tensor([[1., 2., 3.]])
    """
    input, weight, bias = lowered(input, weight, bias)  # type: ignore[assignment]
    return torch.ops.pyft.partial_linear(
        input, weight, bias, weight_part, bias_part, rows, row_start, columns, blocks, list(block_size)
    )


# ---------------------------------------------------------------- embedding


def _embedding(weight: Tensor, indices: Tensor, *part: object) -> Tensor:
    return F.embedding(indices, weight)


def _embedding_backward(
    grad: Tensor,
    indices: Tensor,
    places: Tensor,
    columns: Tensor | None,
    row_count: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    grad = grad if columns is None else grad.index_select(-1, columns)
    # Tokens that do not train share one more row, which is the padding and so is not added up.
    found = torch.ops.aten.embedding_dense_backward(
        grad.contiguous(), places[indices], row_count + 1, row_count, scale_grad_by_freq
    )
    return found[:row_count].clone()


def _embedding_backward_fake(
    grad: Tensor,
    indices: Tensor,
    places: Tensor,
    columns: Tensor | None,
    row_count: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    return grad.new_empty((row_count, grad.shape[-1] if columns is None else columns.shape[0]))


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, part, places, columns, scale = inputs
    ctx.save_for_backward(indices, places, columns)
    ctx.row_count, ctx.scale, ctx.dtype = part.shape[0], scale, part.dtype


def _embedding_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, places, columns = ctx.saved_tensors
    found = torch.ops.pyft.partial_embedding_backward(grad, indices, places, columns, ctx.row_count, ctx.scale)
    return None, None, found.to(ctx.dtype), None, None, None


def partial_embedding(
    weight: Tensor,
    indices: Tensor,
    weight_part: Tensor,
    places: Tensor,
    columns: Tensor | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """`F.embedding(indices, weight)`, of which only a part of `weight` has a gradient.

    Args:
        weight: (V, D), with the values of the part in their places. It gets no gradient.
        indices: integers of any shape.
        weight_part: (r, D), or (r, c) with `columns`. Not read; gets the gradient.
        places: (V,) int64, for each token its row in the part; r where it does not train.
        columns: (c,) int64, or None for all D.
        scale_grad_by_freq: divide by how often a token is in `indices`, as in `F.embedding`.

    Returns:
        (..., D). A second derivative is refused with a RuntimeError.

    >>> part = torch.zeros(1, 2, requires_grad=True)
    >>> places = torch.tensor([1, 0, 1])  # token 1 trains
    >>> partial_embedding(torch.ones(3, 2), torch.tensor([1, 1, 2]), part, places).sum().backward()
    >>> part.grad
    tensor([[2., 2.]])
    """
    return torch.ops.pyft.partial_embedding(weight, indices, weight_part, places, columns, scale_grad_by_freq)


def register(name: str, forward: Any, fake: Any, backward: Any, backward_fake: Any, setup: Any, formula: Any) -> None:
    """Kernels, fakes and autograd of an op and of its backward, "<name>_backward"."""
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyft::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"pyft::{name}_backward", backward_fake, lib=LIBRARY)
    torch.library.register_autograd(f"pyft::{name}", formula, setup_context=setup, lib=LIBRARY)
    refuse = refuse_second_backward(name.removeprefix("partial_"))
    torch.library.register_autograd(f"pyft::{name}_backward", refuse, lib=LIBRARY)


register(
    "partial_linear", _linear, _linear, _linear_backward, _linear_backward_fake, _linear_setup, _linear_formula
)  # fmt: skip
register(
    "partial_embedding", _embedding, _embedding, _embedding_backward, _embedding_backward_fake, _embedding_setup,
    _embedding_formula,
)  # fmt: skip
