"""Convolutions of whose kernels a part trains: the gradient is taken for the chosen output and input channels only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyft.ops.library import define
from pyft.ops.partial import as_dtype, lowered, nothing, pick, register

_PART = "Tensor? rows, int row_start, Tensor? real, int part_groups, Tensor? blocks, int[] block_size"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
define(
    "partial_conv(Tensor input, Tensor weight, Tensor? bias, Tensor weight_part, Tensor? bias_part, "
    f"Tensor? channels, {_PART}, {_GEOMETRY}) -> Tensor"
)
define(
    "partial_conv_backward(Tensor grad, Tensor kept, Tensor? weight, SymInt[] input_shape, int[] kernel_size, "
    f"int row_count, {_PART}, {_GEOMETRY}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, weight_part: Tensor, bias_part: Tensor | None,
    channels: Tensor | None, rows: Tensor | None, row_start: int, real: Tensor | None, part_groups: int,
    blocks: Tensor | None, block_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    return torch.ops.aten.convolution(input, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _kernel_gradient(
    grad: Tensor, input: Tensor, kernel_size: Sequence[int], geometry: Sequence[Any], groups: int
) -> Tensor:
    """(channels of grad, channels of input / groups, *kernel_size)"""
    # Of the weight only the shape is looked at.
    like = grad.new_empty(1).expand(grad.shape[1], input.shape[1] // groups, *kernel_size)
    return torch.ops.aten.convolution_backward(
        grad, input, like, None, *geometry, False, [0] * len(kernel_size), groups, [False, True, False]
    )[1]


def _conv_backward(
    grad: Tensor, kept: Tensor, weight: Tensor | None, input_shape: Sequence[int], kernel_size: Sequence[int],
    row_count: int, rows: Tensor | None, row_start: int, real: Tensor | None, part_groups: int, blocks: Tensor | None,
    block_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = (stride, padding, dilation)
    grad_input, grad_bias, part, bias_part = nothing(grad)
    if wanted[0] and weight is not None:
        like = grad.new_empty(1).expand(input_shape)
        grad_input = torch.ops.aten.convolution_backward(
            grad, like, weight, None, *geometry, False, [0] * len(stride), groups, [True, False, False]
        )[0]
    over = [0, *range(2, grad.ndim)]
    grad_bias = grad.sum(over) if wanted[1] else grad_bias
    if wanted[2] and blocks is not None:
        part = _block_kernels(grad, kept, blocks, block_size, kernel_size, geometry)
        return grad_input, grad_bias, part, bias_part
    chosen = pick(grad, 1, rows, row_start, row_count)
    if wanted[2]:
        part = _kernel_gradient(chosen, kept, kernel_size, geometry, part_groups)
        part = part if real is None else part.index_select(0, real)
    if wanted[3]:
        bias_part = chosen.sum(over)
        bias_part = bias_part if real is None else bias_part.index_select(0, real)
    return grad_input, grad_bias, part, bias_part


def _block_kernels(
    grad: Tensor,
    kept: Tensor,
    blocks: Tensor,
    block_size: Sequence[int],
    kernel_size: Sequence[int],
    geometry: Sequence[Any],
) -> Tensor:
    """(blocks * height, width, *kernel_size): blocks in one row of the grid share a convolution."""
    height, width = block_size
    at: dict[int, list[int]] = defaultdict(list)
    for i, j in blocks.tolist():
        at[i].append(j)
    found = []
    for i, columns in at.items():
        channels = torch.cat([torch.arange(j * width, (j + 1) * width, device=grad.device) for j in columns])
        strip = _kernel_gradient(
            grad.narrow(1, i * height, height), kept.index_select(1, channels), kernel_size, geometry, 1
        )
        found += list(strip.split(width, 1))
    return torch.cat(found)


def _conv_backward_fake(
    grad: Tensor, kept: Tensor, weight: Tensor | None, input_shape: Sequence[int], kernel_size: Sequence[int],
    row_count: int, rows: Tensor | None, row_start: int, real: Tensor | None, part_groups: int, blocks: Tensor | None,
    block_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_input = grad.new_empty(0)
    if wanted[0] and weight is not None:
        like = grad.new_empty(1).expand(input_shape)
        grad_input = torch.ops.aten.convolution_backward(
            grad, like, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [True, False, False]
        )[0]
    width = block_size[1] if blocks is not None else kept.shape[1] // part_groups
    return (
        grad_input,
        grad.new_empty(grad.shape[1] if wanted[1] else 0),
        grad.new_empty((row_count, width, *kernel_size) if wanted[2] else 0),
        grad.new_empty(row_count if wanted[3] else 0),
    )


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (input, weight, _, part, bias_part, channels, rows, row_start, real, part_groups, blocks, block_size,
     stride, padding, dilation, groups) = inputs  # fmt: skip
    needs = ctx.needs_input_grad
    kept = input if needs[3] else input.new_empty((0, 1))
    kept = kept.index_select(1, channels) if needs[3] and channels is not None else kept
    ctx.save_for_backward(kept, weight if needs[0] else None, rows, real, blocks)
    ctx.shapes = (list(input.shape), list(weight.shape[2:]), part.shape[0])
    ctx.part = (row_start, part_groups, block_size)
    ctx.geometry = (stride, padding, dilation, groups)
    ctx.dtypes = (part.dtype, None if bias_part is None else bias_part.dtype)


def _conv_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, rows, real, blocks = ctx.saved_tensors
    row_start, part_groups, block_size = ctx.part
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    found = torch.ops.pyft.partial_conv_backward(
        grad, kept, weight, *ctx.shapes, rows, row_start, real, part_groups, blocks, block_size, *ctx.geometry, wanted
    )
    given: list[Tensor | None] = [g if want else None for g, want in zip(found, wanted, strict=True)]
    input, bias, part, bias_part = given
    return input, None, bias, as_dtype(part, ctx.dtypes[0]), as_dtype(bias_part, ctx.dtypes[1]), *[None] * 11


register("partial_conv", _conv, _conv, _conv_backward, _conv_backward_fake, _conv_setup, _conv_formula)


def partial_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_part: Tensor,
    bias_part: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    row_start: int = -1,
    channels: Tensor | None = None,
    real: Tensor | None = None,
    part_groups: int = 1,
    blocks: Tensor | None = None,
    block_size: Sequence[int] = (1, 1),
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """A convolution over 1, 2 or 3 dimensions, of which only a part of `weight` has a gradient.

    Args:
        input: (N, C, ...). Of it, backward keeps the chosen `channels`.
        weight: (O, C / groups, ...), with the values of the part in their places. It gets no gradient.
        bias: (O,) or None; gets a gradient where it requires one.
        weight_part: (r, c, ...), or (k * height, width, ...) for blocks. Not read; gets the gradient.
        bias_part: (r,), not read; gets the gradient of these entries of bias.
        rows: (n,) int64, output channels, the same number for each of `part_groups`; or `row_start`, the first of r
            side by side; neither: all.
        channels: (part_groups * c,) int64, input channels, or None for all.
        real: (r,) int64, which of `rows` are in the part, where some were added to make the groups even.
        part_groups: groups that `rows` and `channels` are of.
        blocks: (k, 2) int64, row and column of each block in the grid of output and input channels; needs groups=1.
        block_size: (height, width) of a block.
        stride, padding, dilation: one number per dimension. groups: as in `F.conv2d`.

    Returns:
        What `F.conv2d` returns. A second derivative is refused with a RuntimeError.

    >>> part = torch.zeros(1, 1, 1, 1, requires_grad=True)
    >>> geometry = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    >>> out = partial_conv(torch.ones(1, 1, 2, 2), torch.ones(3, 1, 1, 1), None, part, row_start=2, **geometry)
    >>> out.sum().backward()
    >>> part.grad.item()
    4.0
    """
    input, weight, bias = lowered(input, weight, bias)  # type: ignore[assignment]
    return torch.ops.pyft.partial_conv(
        input, weight, bias, weight_part, bias_part, channels, rows, row_start, real, part_groups, blocks,
        list(block_size), list(stride), list(padding), list(dilation), groups,
    )  # fmt: skip
