"""Values of samples, one after the other without padding: in memory, or in files that are mapped into it."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pyft.core.transfer import to_device
from pyft.freezing.prefix_cache_play import BATCH, LENGTH, Dim, Key, Leaf

CPU = torch.device("cpu")


class Arena(Protocol):
    """Numbers of one dtype, which only grow."""

    size: int

    def append(self, values: torch.Tensor) -> None:
        """Add (n,) values."""

    def view(self) -> torch.Tensor:
        """(size,) all values. Not to be written to."""


class MemoryArena:
    """An arena in memory.

    Args:
        room: values to make room for at once.
        device: of which memory. A device that has no more gives its values to the host.
    """

    def __init__(self, dtype: torch.dtype, room: int = 0, device: torch.device = CPU) -> None:
        self.size = 0
        try:
            self._values = torch.empty(room, dtype=dtype, device=device)
        except torch.OutOfMemoryError:
            self._values = torch.empty(room, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where the values are now."""
        return self._values.device

    def append(self, values: torch.Tensor) -> None:
        """Add (n,) values."""
        end = self.size + len(values)
        if end > len(self._values):
            self._grow(max(end, 2 * len(self._values)))
        self._values[self.size : end] = values.to(self.device)
        self.size = end

    def _grow(self, room: int) -> None:
        old = self._values
        try:
            self._values = torch.empty(room, dtype=old.dtype, device=old.device)
        except torch.OutOfMemoryError:
            self._values = torch.empty(room, dtype=old.dtype)
        self._values[: self.size] = old[: self.size].to(self.device)

    def view(self) -> torch.Tensor:
        """(size,) all values."""
        return self._values[: self.size]


class FileArena:
    """An arena in a file, with a running checksum.

    Args:
        size, crc: of what is in the file already; what lies beyond is cut off.
    """

    def __init__(self, path: Path, dtype: torch.dtype, size: int = 0, crc: int = 0) -> None:
        self.path, self.dtype, self.size, self.crc = path, dtype, size, crc
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._file = os.fdopen(handle, "r+b", buffering=1 << 20)
        self._file.truncate(self.nbytes)
        self._file.seek(self.nbytes)
        self._view: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.dtype.itemsize

    def append(self, values: torch.Tensor) -> None:
        """Add (n,) values.

        Raises:
            OSError: the disk is full.
        """
        data = values.contiguous().view(torch.uint8).numpy().data
        self._file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(values)
        self._view = None

    def view(self) -> torch.Tensor:
        """(size,) all values, read from the file as they are used."""
        if self._view is None:
            self._file.flush()
            self._view = map_file(self.path, self.size, self.dtype)
        return self._view

    def sync(self) -> None:
        """Make what was added durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what is mapped stays."""
        self._file.close()


class MappedArena:
    """A finished file."""

    def __init__(self, path: Path, dtype: torch.dtype, size: int) -> None:
        self.size = size
        self._view = map_file(path, size, dtype)

    def append(self, values: torch.Tensor) -> None:
        """A finished file is complete."""
        raise RuntimeError("the file is finished")

    def view(self) -> torch.Tensor:
        """(size,) all values."""
        return self._view


def map_file(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(size,) the values of a file; writing to them would not reach it."""
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)


class Column:
    """One value of all samples.

    Args:
        leaf: what the model gives for a batch.
        dtype: in which it is stored.

    Attributes:
        device: on which packed values are given.
    """

    device: torch.device = CPU

    def __init__(self, leaf: Leaf, dtype: torch.dtype) -> None:
        batch = leaf.dims.index(BATCH)
        others = [dim for dim in leaf.order if dim != batch]
        self.leaf, self.dtype = leaf, dtype
        self.permutation = (batch, *others)
        self.sample: tuple[Dim, ...] = tuple(leaf.dims[dim] for dim in others)
        self.ragged = LENGTH in self.sample
        self._row = math.prod(int(dim) for dim in self.sample if dim != LENGTH)
        self._power = self.sample.count(LENGTH)
        self._tokens_first = self._power == 1 and self.sample[0] == LENGTH

    def elements(self, lengths: np.ndarray) -> np.ndarray:
        """(n,) numbers of values that samples of these lengths take."""
        return self._row * np.asarray(lengths, dtype=np.int64) ** self._power

    def pack(self, value: torch.Tensor, rows: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
        """(sum,) a copy of the given rows of a batch's value, without padding."""
        found = value.detach().permute(self.permutation).index_select(0, rows.to(value.device))
        found = found.to(self.device, self.dtype)
        if not self.ragged:
            return found.reshape(-1)
        if self._tokens_first:
            mask = torch.arange(found.shape[1]) < torch.from_numpy(lengths)[:, None]
            return found[mask.to(self.device)].reshape(-1)
        return torch.cat([_cut(row, self.sample, int(n)).reshape(-1) for row, n in zip(found, lengths, strict=True)])

    def unpack(self, values: torch.Tensor, starts: np.ndarray, lengths: np.ndarray, length: int) -> torch.Tensor:
        """The value of a batch of the padded `length`, with zeros as padding, in the form that the model gives it.

        Args:
            values: all of the arena. starts, lengths: (B,) of the samples.
        """
        count = len(starts)
        if not self.ragged:
            places = to_device(torch.from_numpy(starts // max(self._row, 1)), values.device)
            shape = [int(dim) for dim in self.sample]
            found = values.view(-1, *shape).index_select(0, places) if self._row else values.new_empty((count, *shape))
        elif self._tokens_first:
            found = self._unpack_tokens(values, starts, lengths, length)
        else:
            found = values.new_zeros([count, *(length if dim == LENGTH else int(dim) for dim in self.sample)])
            for row, start, size in zip(found, starts.tolist(), lengths.tolist(), strict=True):
                target = _cut(row, self.sample, size)
                target.copy_(values[start : start + target.numel()].view(target.shape))
        inverse = np.argsort(self.permutation).tolist()
        return found.permute(inverse)

    def _unpack_tokens(
        self, values: torch.Tensor, starts: np.ndarray, lengths: np.ndarray, length: int
    ) -> torch.Tensor:
        inner = [int(dim) for dim in self.sample[1:]]
        steps = np.arange(length)
        mask = steps < lengths[:, None]
        places = np.where(mask, starts[:, None] // max(self._row, 1) + steps, 0)
        found = values.view(-1, *inner).index_select(0, to_device(torch.from_numpy(places.reshape(-1)), values.device))
        found = found.view(len(starts), length, *inner)
        if not mask.all():
            found[to_device(torch.from_numpy(~mask), values.device)] = 0
        return found


def _cut(row: torch.Tensor, sample: Sequence[Dim], length: int) -> torch.Tensor:
    """The part of a padded sample that is its own."""
    for dim, size in enumerate(sample):
        if size == LENGTH:
            row = row.narrow(dim, 0, length)
    return row


class FeatureStore:
    """The stored values of all samples, by sample number.

    Args:
        columns: by key.
        arenas: where each column's values are, by key.
    """

    def __init__(self, columns: Mapping[Key, Column], arenas: Mapping[Key, Arena]) -> None:
        self.columns, self.arenas = dict(columns), dict(arenas)
        self.count = 0
        self._place = np.full(0, -1, dtype=np.int64)
        self._samples = np.zeros((0, 2), dtype=np.int64)
        self._starts = {key: np.zeros(0, dtype=np.int64) for key in columns}

    @property
    def samples(self) -> np.ndarray:
        """(n, 2) number and length of the stored samples, in the order in which they came."""
        return self._samples[: self.count]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored values."""
        return sum(arena.size * self.columns[key].dtype.itemsize for key, arena in self.arenas.items())

    def has(self, numbers: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """(n,) bool: which samples are stored, with these lengths where given."""
        known = np.zeros(len(numbers), dtype=bool)
        inside = numbers < len(self._place)
        known[inside] = self._place[numbers[inside]] >= 0
        if lengths is not None and known.any():
            known[known] = self._samples[self._place[numbers[known]], 1] == lengths[known]
        return known

    def add(self, numbers: np.ndarray, lengths: np.ndarray, packed: Mapping[Key, torch.Tensor]) -> None:
        """Store new samples: their numbers (n,), lengths (n,), and per column what `Column.pack` gave."""
        for key, values in packed.items():
            self.arenas[key].append(values)
        self.know(np.stack([numbers, lengths], axis=1))

    def know(self, samples: np.ndarray) -> None:
        """Note samples (n, 2) whose values were appended to the arenas, in this order."""
        end = self.count + len(samples)
        if end > len(self._samples):
            self._samples = _grown(self._samples, end)
            self._starts = {key: _grown(starts, end) for key, starts in self._starts.items()}
        self._samples[self.count : end] = samples
        for key, starts in self._starts.items():
            sizes = self.columns[key].elements(samples[:, 1])
            last = self.count - 1
            begin = 0
            if self.count:
                begin = int(starts[last] + self.columns[key].elements(self._samples[last : self.count, 1])[0])
            starts[self.count : end] = begin + np.cumsum(sizes) - sizes
        most = int(samples[:, 0].max(initial=-1)) + 1
        if most > len(self._place):
            self._place = np.concatenate([self._place, np.full(max(most, 2 * len(self._place)), -1, dtype=np.int64)])
        self._place[samples[:, 0]] = np.arange(self.count, end)
        self.count = end

    def get(self, key: Key, numbers: np.ndarray, length: int) -> torch.Tensor:
        """The value of a batch of stored samples (B,), padded to `length`: a new tensor, where the values are."""
        places = self._place[numbers]
        lengths = self._samples[places, 1]
        return self.columns[key].unpack(self.arenas[key].view(), self._starts[key][places], lengths, length)


def _grown(values: np.ndarray, least: int) -> np.ndarray:
    more = max(least - len(values), len(values))
    return np.concatenate([values, np.zeros((more, *values.shape[1:]), dtype=values.dtype)])
