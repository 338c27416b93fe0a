"""Convolutions of whose kernels a part trains: the gradient is taken for the chosen output and input channels only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pyft.ops.library import define
from pyft.ops.masked_rows import gather_channels
from pyft.ops.partial import as_dtype, lowered, nothing, pick, register

# Where the blocks are decides how many convolutions there are, so the host must know it: numbers, not a tensor.
_PART = (
    "Tensor? rows, int row_start, Tensor? real, int part_groups, int[]? blocks, Tensor? block_channels, "
    "int[] block_size"
)
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
    blocks: Sequence[int] | None, block_channels: Tensor | None, block_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
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
    row_count: int, rows: Tensor | None, row_start: int, real: Tensor | None, part_groups: int,
    blocks: Sequence[int] | None, block_channels: Tensor | None, block_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = (stride, padding, dilation)
    grad_input, grad_bias, part, bias_part = nothing(grad)
    if wanted[0] and weight is not None:
        like = grad.new_empty(1).expand(input_shape)
        grad_input = torch.ops.aten.convolution_backward(
            grad, like, weight, None, *geometry, False, [0] * len(stride), groups, [True, False, False]
        )[0]
    grad_bias = grad.sum(_all_but_channels(grad)) if wanted[1] else grad_bias
    if wanted[2] and blocks is not None and block_channels is not None:
        part = _block_kernels(grad, kept, blocks, block_channels, block_size, kernel_size, geometry)
    elif wanted[2] or wanted[3]:
        chosen, sums = _chosen_rows(grad, rows, row_start, row_count, wanted[3])
        if wanted[2]:
            part = _kernel_gradient(chosen, kept, kernel_size, geometry, part_groups)
            part = part if real is None else part.index_select(0, real)
        if wanted[3]:
            bias_part = sums if real is None else sums.index_select(0, real)
    return grad_input, grad_bias, part, bias_part


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _chosen_rows(
    grad: Tensor, rows: Tensor | None, row_start: int, row_count: int, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """The chosen channels of the output's gradient, a view where they are side by side, and their sums if wanted."""
    if rows is not None:
        return gather_channels(grad, rows, with_sums)
    chosen = pick(grad, 1, None, row_start, row_count)
    return chosen, chosen.sum(_all_but_channels(chosen)) if with_sums else grad.new_empty(0)


def _block_kernels(
    grad: Tensor,
    kept: Tensor,
    blocks: Sequence[int],
    block_channels: Tensor,
    block_size: Sequence[int],
    kernel_size: Sequence[int],
    geometry: Sequence[Any],
) -> Tensor:
    """(blocks * height, width, *kernel_size): neighbours in a row of the grid share a convolution."""
    height, width = block_size
    found: list[Tensor] = []
    for i, places in groupby(zip(blocks[::2], blocks[1::2], strict=True), key=lambda place: place[0]):
        columns, done = [column for _, column in places], len(found)
        if columns == list(range(columns[0], columns[0] + len(columns))):
            channels = kept.narrow(1, columns[0] * width, len(columns) * width)
        else:
            channels = gather_channels(kept, block_channels.narrow(0, done * width, len(columns) * width))[0]
        strip = _kernel_gradient(grad.narrow(1, i * height, height), channels, kernel_size, geometry, 1)
        found += strip.split(width, 1)
    return torch.cat(found)


def _conv_backward_fake(
    grad: Tensor, kept: Tensor, weight: Tensor | None, input_shape: Sequence[int], kernel_size: Sequence[int],
    row_count: int, rows: Tensor | None, row_start: int, real: Tensor | None, part_groups: int,
    blocks: Sequence[int] | None, block_channels: Tensor | None, block_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, wanted: Sequence[bool],
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
    (input, weight, _, part, bias_part, channels, rows, row_start, real, part_groups, blocks, block_channels,
     block_size, stride, padding, dilation, groups) = inputs  # fmt: skip
    needs = ctx.needs_input_grad
    kept = input if needs[3] else input.new_empty((0, 1))
    # Copied even where they lie side by side: a view would keep the whole input until backward.
    kept = gather_channels(input.detach(), channels)[0] if needs[3] and channels is not None else kept
    ctx.save_for_backward(kept, weight if needs[0] else None, rows, real, block_channels)
    ctx.shapes = (list(input.shape), list(weight.shape[2:]), part.shape[0])
    ctx.part = (row_start, part_groups, blocks, block_size)
    ctx.geometry = (stride, padding, dilation, groups)
    ctx.dtypes = (part.dtype, None if bias_part is None else bias_part.dtype)


def _conv_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, rows, real, block_channels = ctx.saved_tensors
    row_start, part_groups, blocks, block_size = ctx.part
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    found = torch.ops.pyft.partial_conv_backward(
        grad, kept, weight, *ctx.shapes, rows, row_start, real, part_groups, blocks, block_channels, block_size,
        *ctx.geometry, wanted,
    )  # fmt: skip
    given: list[Tensor | None] = [g if want else None for g, want in zip(found, wanted, strict=True)]
    input, bias, part, bias_part = given
    return input, None, bias, as_dtype(part, ctx.dtypes[0]), as_dtype(bias_part, ctx.dtypes[1]), *[None] * 12


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
    blocks: Sequence[int] | None = None,
    block_channels: Tensor | None = None,
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
        blocks: 2 k numbers, row and column of each block in the grid of output channels and kept input channels; needs
            groups=1.
        block_channels: (k * width,) int64, the kept input channels of each block in turn. Default: made of `blocks`.
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
    if blocks is not None and block_channels is None:
        block_channels = channels_of_blocks(blocks, block_size[1]).to(input.device)
    return torch.ops.pyft.partial_conv(
        input, weight, bias, weight_part, bias_part, channels, rows, row_start, real, part_groups, blocks,
        block_channels, list(block_size), list(stride), list(padding), list(dilation), groups,
    )  # fmt: skip


def channels_of_blocks(blocks: Sequence[int], width: int) -> Tensor:
    """(k * width,) int64 on the CPU: the input channels of blocks at these rows and columns, one after the other.

    >>> channels_of_blocks([0, 2, 1, 0], width=2)
    tensor([4, 5, 0, 1])
    """
    columns = torch.tensor(list(blocks[1::2]), dtype=torch.int64)
    return (columns[:, None] * width + torch.arange(width)).reshape(-1)
