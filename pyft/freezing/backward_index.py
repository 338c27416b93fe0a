"""What the backward pass of a layer that trains in part has to look up: made once, from its entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyft.freezing.entries import Entries


def kept_columns(entries: Entries) -> Tensor | None:
    """The columns of the input that backward needs; None for all."""
    if entries.blocks is None:
        return entries.columns
    width = entries.block_size[1]
    starts = entries.blocks[:, 1].unique() * width
    if len(starts) * width == entries.shape[1]:
        return None
    return (starts[:, None] + torch.arange(width)).reshape(-1)


def kept_blocks(entries: Entries) -> Tensor | None:
    """(k, 2) places of the blocks, the column counted among those that are kept."""
    if entries.blocks is None:
        return None
    column = torch.searchsorted(entries.blocks[:, 1].unique(), entries.blocks[:, 1].contiguous())
    return torch.stack([entries.blocks[:, 0], column], 1)


def token_places(entries: Entries, padding_idx: int | None) -> Tensor:
    """(V,) int64: each token's row in the part; one more than the last where it does not train."""
    count = entries.part_shape[0]
    places = torch.full((entries.shape[0],), count)
    places[slice(None) if entries.rows is None else entries.rows] = torch.arange(count)
    if padding_idx is not None:
        places[padding_idx] = count
    return places


@dataclass(frozen=True)
class ConvIndex:
    """Channels as `pyft.ops.partial_conv` takes them."""

    rows: Tensor | None
    row_start: int
    channels: Tensor | None
    real: Tensor | None
    groups: int


def conv_index(entries: Entries, groups: int) -> ConvIndex:
    """The output and input channels of the part of a convolution with `groups`.

    A convolution needs as many output channels in each group: where the part has not, channels come twice, and
    `real` says which of the results count.

    >>> index = conv_index(Entries((4, 3), torch.tensor([0, 1, 2])), groups=2)
    >>> index.rows, index.real
    (tensor([0, 1, 2, 2]), tensor([0, 1, 2]))
    """
    if groups == 1:
        start = entries.run
        rows = None if start is not None else entries.rows
        return ConvIndex(rows, -1 if start is None else start, kept_columns(entries), None, 1)
    per_group = entries.shape[0] // groups
    rows = torch.arange(entries.shape[0]) if entries.rows is None else entries.rows
    touched, counts = (rows // per_group).unique(return_counts=True)
    most = int(counts.max())
    padded = torch.cat([torch.cat([own, own[:1].expand(most - len(own))]) for own in rows.split(counts.tolist())])
    real = None
    if int(counts.min()) < most:
        real = (torch.arange(most) < counts[:, None]).reshape(-1).nonzero()[:, 0]
    channels = None
    if len(touched) < groups or entries.columns is not None:
        columns = torch.arange(entries.shape[1]) if entries.columns is None else entries.columns
        channels = (touched[:, None] * entries.shape[1] + columns).reshape(-1)
    if entries.rows is None:
        return ConvIndex(None, -1, channels, real, len(touched))
    start = int(padded[0])
    if torch.equal(padded, torch.arange(start, start + len(padded))):
        return ConvIndex(None, start, channels, real, len(touched))
    return ConvIndex(padded, -1, channels, real, len(touched))
