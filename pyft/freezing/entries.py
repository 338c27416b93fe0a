"""Which entries of a weight: rows, columns, the crossing of both, or blocks of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyft.errors import ConfigError
from pyft.ops.masked_rows import write_part_

SHOWN = 6


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of a weight of shape (rows, columns, ...), ascending and each once.

    Attributes:
        shape: of the whole weight.
        rows: (r,) int64 on the CPU; None is every row.
        columns: (c,) int64 on the CPU; None is every column.
        blocks: (k, 2) int64 on the CPU, places (row, column) in a grid of blocks; None where there are no blocks.
        block_size: rows and columns of a block.
        run: the first row, where the entries are whole rows side by side, and so a view of the weight; else None.
    """

    shape: tuple[int, ...]
    rows: Tensor | None = None
    columns: Tensor | None = None
    blocks: Tensor | None = None
    block_size: tuple[int, int] = (1, 1)
    run: int | None = field(init=False, default=None)
    # Rows and columns on each device other than the CPU: a copy in every step would wait for the GPU.
    _placed: dict[torch.device, tuple[Tensor | None, Tensor | None]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows is None or self.columns is not None or self.blocks is not None or not len(self.rows):
            return
        first, last = int(self.rows[0]), int(self.rows[-1])
        object.__setattr__(self, "run", first if last - first + 1 == len(self.rows) else None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Entries) or (self.shape, self.block_size) != (other.shape, other.block_size):
            return False
        return all(_same(getattr(self, name), getattr(other, name)) for name in ("rows", "columns", "blocks"))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        # What lies on a GPU here stays here.
        return Entries, (self.shape, self.rows, self.columns, self.blocks, self.block_size)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the compact part; blocks lie one below the other."""
        if self.blocks is not None:
            height, width = self.block_size
            return (len(self.blocks) * height, width, *self.shape[2:])
        lead = [self.shape[0] if self.rows is None else len(self.rows)]
        if len(self.shape) > 1:
            lead.append(self.shape[1] if self.columns is None else len(self.columns))
        return (*lead, *self.shape[2:])

    @property
    def count(self) -> int:
        """Entries in all."""
        return torch.Size(self.part_shape).numel()

    def take(self, full: Tensor) -> Tensor:
        """The entries of `full`, compact; a copy."""
        if self.blocks is not None:
            return self._grid(full)[self._places(full)].reshape(self.part_shape)
        rows, columns = self._indices(full)
        part = full if rows is None else full.index_select(0, rows)
        part = part if columns is None else part.index_select(1, columns)
        return part.clone() if part is full else part

    def put(self, full: Tensor, part: Tensor) -> Tensor:
        """A new tensor: `full` with the entries of `part` in their places. Differentiable in both."""
        if self.blocks is not None:
            grid = self._grid(full).index_put(self._places(full), self._stacked(part))
            return self._ungrid(grid)
        rows, columns = self._indices(full)
        if rows is not None and columns is not None:
            return full.index_put((rows[:, None], columns), part)
        if rows is None and columns is None:
            return part.clone()
        return full.index_copy(0, rows, part) if rows is not None else full.index_copy(1, columns, part)  # type: ignore[arg-type]

    def write_(self, full: Tensor, part: Tensor) -> None:
        """Copy the entries of `part` into their places in `full`."""
        with torch.no_grad():
            if self.blocks is not None:
                height, width = self.block_size
                for (i, j), block in zip(self.blocks.tolist(), self._stacked(part), strict=True):
                    full.narrow(0, i * height, height).narrow(1, j * width, width).copy_(block)
                return
            start = self.run
            rows, columns = self._indices(full)
            if start is not None:
                full.narrow(0, start, len(part)).copy_(part)
            else:
                write_part_(full, part, rows, columns)

    def rest(self, full: Tensor) -> Tensor:
        """A copy of `full` in which the entries are 0: what is left is what must not change."""
        rest = full.detach().clone()
        self.write_(rest, torch.zeros((), dtype=full.dtype, device=full.device).expand(self.part_shape))
        return rest

    def _indices(self, full: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if full.device.type == "cpu":
            return self.rows, self.columns
        if full.device not in self._placed:
            rows, columns = (None if index is None else index.to(full.device) for index in (self.rows, self.columns))
            self._placed[full.device] = (rows, columns)
        return self._placed[full.device]

    def _grid(self, full: Tensor) -> Tensor:
        """(grid rows, grid columns, height, width, ...)"""
        height, width = self.block_size
        split = full.reshape(full.shape[0] // height, height, full.shape[1] // width, width, *full.shape[2:])
        return split.transpose(1, 2)

    def _ungrid(self, grid: Tensor) -> Tensor:
        return grid.transpose(1, 2).reshape(self.shape)

    def _places(self, full: Tensor) -> tuple[Tensor, Tensor]:
        assert self.blocks is not None
        blocks = self.blocks.to(full.device)
        return blocks[:, 0], blocks[:, 1]

    def _stacked(self, part: Tensor) -> Tensor:
        assert self.blocks is not None
        return part.reshape(len(self.blocks), *self.block_size, *self.shape[2:])

    def __str__(self) -> str:
        if self.blocks is not None:
            height, width = self.block_size
            total = (self.shape[0] // height) * (self.shape[1] // width)
            return f"{len(self.blocks)} of {total} blocks of {height} x {width}"
        words = []
        if self.rows is not None:
            words.append(f"{len(self.rows):,} of {self.shape[0]:,} rows")
        if self.columns is not None:
            words.append(f"{len(self.columns):,} of {self.shape[1]:,} columns")
        return " x ".join(words) or "everything"

    def __repr__(self) -> str:
        shown = [
            f"{name} {numbers[:SHOWN]}{'...' * (len(numbers) > SHOWN)}"
            for name in ("rows", "columns", "blocks")
            if (index := getattr(self, name)) is not None and (numbers := index.tolist()) is not None
        ]
        return f"Entries({self}: {'; '.join(shown)})"


def make_entries(
    shape: Sequence[int],
    rows: Any = None,
    columns: Any = None,
    blocks: Any = None,
    block_size: tuple[int, int] = (32, 32),
    name: str = "weight",
) -> Entries:
    """The entries of a weight of `shape` that the arguments name; `pyft.train_only` says what they may be.

    Raises:
        ConfigError: nothing is named, an index is out of range or comes twice, a mask has another length, blocks
            together with rows or columns, or a grid that does not fit the shape.

    >>> make_entries((4, 6), rows=[True, False, False, True])
    Entries(2 of 4 rows: rows [0, 3])
    >>> make_entries((4, 6), rows=slice(2), columns=[-1]).part_shape
    (2, 1)
    """
    shape = tuple(shape)
    if rows is None and columns is None and blocks is None:
        raise ConfigError(f"{name}: say which part trains: rows=, columns= or blocks=")
    if not shape or 0 in shape:
        raise ConfigError(f"{name}: has the shape {shape}, and so no rows to choose from")
    if len(shape) == 1 and (columns is not None or blocks is not None):
        raise ConfigError(f"{name}: has one dimension, and so rows only: give rows=, not columns= or blocks=")
    if blocks is not None:
        if rows is not None or columns is not None:
            raise ConfigError(f"{name}: blocks= says both rows and columns: leave out rows= and columns=")
        return Entries(shape, blocks=_blocks(blocks, shape, block_size, name), block_size=tuple(block_size))  # type: ignore[arg-type]
    return Entries(
        shape,
        None if rows is None else _indices(rows, shape[0], "rows", name),
        None if columns is None else _indices(columns, shape[1], "columns", name),
    )


def _indices(chosen: Any, size: int, what: str, name: str) -> Tensor:
    """(n,) int64, ascending, from a slice, a mask, numbers or one number."""
    if isinstance(chosen, slice):
        found = torch.arange(size)[list(range(size))[chosen]]
    else:
        try:
            found = torch.as_tensor(list(chosen) if isinstance(chosen, range | tuple | set) else chosen).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                f"{name}: {what}={chosen!r}: a slice, a mask, an index or several indices are expected"
            ) from None
        found = found.reshape(1) if found.ndim == 0 and found.dtype != torch.bool else found
        if found.ndim == 1 and found.dtype == torch.bool:
            if len(found) != size:
                raise ConfigError(f"{name}: {what}= is a mask of {len(found)}, but there are {size} {what}")
            found = found.nonzero()[:, 0]
        if found.numel() and (found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool):
            raise ConfigError(
                f"{name}: {what}= has the shape {tuple(found.shape)} and type {found.dtype}: a mask of {size}, or "
                "whole numbers, are expected"
            )
    found = found.reshape(-1).to(torch.int64)
    if not found.numel():
        raise ConfigError(f"{name}: {what}= names none of the {size} {what}, so nothing of it would train")
    outside = found[(found < -size) | (found >= size)]
    if outside.numel():
        raise ConfigError(f"{name}: {what}= holds {int(outside[0])}, but there are {size} {what} (0 to {size - 1})")
    found = torch.where(found < 0, found + size, found)
    unique = found.unique(sorted=True)
    if len(unique) != len(found):
        twice = int(found.sort().values[:-1][found.sort().values.diff() == 0][0])
        raise ConfigError(f"{name}: {what}= holds {twice} twice: name each once")
    return unique


def _blocks(chosen: Any, shape: tuple[int, ...], block_size: Any, name: str) -> Tensor:
    """(k, 2) int64 in row order, from a mask over the grid or from pairs."""
    size = tuple(block_size) if isinstance(block_size, tuple | list) else (block_size,)
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ConfigError(f"{name}: block_size={block_size!r}: two whole numbers (rows, columns) are expected")
    if shape[0] % size[0] or shape[1] % size[1]:
        raise ConfigError(f"{name}: block_size={size} does not divide the shape {shape[:2]}: choose one that does")
    grid = (shape[0] // size[0], shape[1] // size[1])
    try:
        found = torch.as_tensor(chosen).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name}: blocks={chosen!r}: a mask of shape {grid}, or pairs, are expected") from None
    if found.dtype == torch.bool and tuple(found.shape) == grid:
        found = found.nonzero()
    elif found.numel() and (found.ndim != 2 or found.shape[1] != 2 or found.dtype not in _WHOLE):
        raise ConfigError(
            f"{name}: blocks= has the shape {tuple(found.shape)} and type {found.dtype}: a mask of shape {grid}, or "
            "pairs (row, column) in that grid, are expected"
        )
    if not found.numel():
        raise ConfigError(f"{name}: blocks= names none of the {grid[0] * grid[1]} blocks, so nothing would train")
    found = found.to(torch.int64)
    if bool((found < 0).any()) or bool((found >= torch.tensor(grid)).any()):
        raise ConfigError(f"{name}: blocks= holds a place outside the grid of {grid[0]} x {grid[1]} blocks")
    unique = found.unique(dim=0)
    if len(unique) != len(found):
        raise ConfigError(f"{name}: blocks= holds a block twice: name each once")
    return unique


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
