"""A prefix cache that several processes fill: each computes some batches, all store them or read the files of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pyft.freezing.prefix_cache import PrefixCache
from pyft.freezing.prefix_cache_batch import batch_facts
from pyft.freezing.prefix_cache_disk import open_finished
from pyft.freezing.prefix_cache_find import memory_store
from pyft.freezing.prefix_cache_play import Key, StandInError, run_uncompiled
from pyft.freezing.prefix_cache_store import MemoryArena


@dataclass(frozen=True)
class Filled:
    """What is stored of a batch: numbers (n,), lengths (n,), and packed values on the CPU."""

    numbers: np.ndarray
    lengths: np.ndarray
    packed: Mapping[Key, torch.Tensor]


def compute_batch(cache: PrefixCache, indices: np.ndarray, inputs: object, view: int = 0) -> Filled:
    """What `PrefixCache.fill` would store of a batch of different samples; nothing is stored.

    Raises:
        StandInError: the model takes another way for these samples.
    """
    facts = batch_facts(inputs)
    if facts.form != cache._example.form:
        raise StandInError("its inputs have other sizes than those of the example")
    with run_uncompiled():
        packed = cache.packed(inputs)
    numbers = cache._view_numbers(indices, view)
    return Filled(numbers, facts.lengths, {key: value.cpu() for key, value in packed.items()})


def store_batch(cache: PrefixCache, filled: Filled) -> None:
    """Store what a process has computed.

    Raises:
        OSError: the disk is full. From then on the whole model runs.
    """
    cache._commit(filled.numbers, filled.lengths, filled.packed)


def memory_of(cache: PrefixCache) -> torch.device | None:
    """The device in whose memory values are; None: in files."""
    if cache.on_disk:
        return None
    devices = {arena.device for arena in cache._store.arenas.values() if isinstance(arena, MemoryArena)}
    return min(devices, key=lambda device: device.type == "cpu", default=torch.device("cpu"))


def keep_on_own_gpu(cache: PrefixCache, count: int) -> None:
    """Keep values in the memory of the model's GPU, with room for `count` samples."""
    if not len(cache):
        device = next(cache.model.parameters()).device
        cache._store = memory_store(cache._columns, count * cache.augment_views, device)


def attach(cache: PrefixCache, root: Path, key: str) -> bool:
    """Read the files that another process has finished; returns whether they are there."""
    found = open_finished(root, f"{cache.key}-{key}", cache._columns, cache.say)
    if found is not None:
        cache._store = found
    return found is not None
