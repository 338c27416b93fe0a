"""Processes that fill a folder of stored features; a module by itself, for a spawned process to find."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import pyft
from pyft.freezing import prefix_cache_disk
from pyft.freezing.prefix_cache import PrefixCache

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
BATCHES = [np.arange(start, start + 4) for start in range(0, 40, 4)]


def body() -> nn.Module:
    """A model whose first layers are frozen; two values of each sample are stored, one of them a Linear's."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Sequential(nn.Linear(16, 8), nn.Tanh())
            self.skip, self.head = nn.Linear(16, 2), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            return self.head(self.two(x)) + self.skip(x)

    model = Two()
    pyft.freeze(model, ["one", "two"])
    return model.train()


def open_cache(folder: Path, **options: Any) -> tuple[PrefixCache, list[str]]:
    """The cache of `body` in a folder, and what it says."""
    said: list[str] = []
    options = {"storage": "disk", "directory": folder, "key": "x", "say": said.append, **options}
    return PrefixCache(body(), INPUTS[:4], **options), said


def fill(cache: PrefixCache, batches: list[np.ndarray] | None = None) -> None:
    """Fill with all batches, or these."""
    cache.fill([(index, INPUTS[torch.from_numpy(index)]) for index in (BATCHES if batches is None else batches)])


def outputs(cache: PrefixCache) -> torch.Tensor:
    """(40, 2) what the model gives with the stored values."""
    found = []
    with torch.no_grad():
        for index in BATCHES:
            with cache.batch(index):
                found.append(cache.model(INPUTS[torch.from_numpy(index)]))
    return torch.cat(found)


def fill_and_finish(rank: int, folder: str, barrier: Any) -> None:
    """Begin when all others begin; leave what the model gives behind."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    barrier.wait(timeout=120)
    cache, _ = open_cache(Path(folder, "features"))
    fill(cache)
    cache.finish()
    torch.save(outputs(cache), Path(folder, f"{rank}.pt"))
    cache.close()


def fill_and_die(rank: int, folder: str, batches: int, noted: bool) -> None:
    """SIGKILL in the middle of a write, with the first batches noted or not."""
    torch.set_num_threads(1)
    prefix_cache_disk.SECONDS_BETWEEN_NOTES = 0.0 if noted else 1e9
    cache, _ = open_cache(Path(folder))
    write = cache._store.add
    done: list[int] = []

    def dying(numbers: np.ndarray, lengths: np.ndarray, packed: Any) -> None:
        if len(done) == batches:
            key, values = next(iter(packed.items()))
            cache._store.arenas[key].append(values[: len(values) // 2])  # one of two values, half of it
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        write(numbers, lengths, packed)

    cache._store.add = dying  # type: ignore[method-assign]
    fill(cache)
