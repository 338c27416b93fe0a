"""Random draws that are functions of (seed, epoch, sample), and never touch, or depend on, a global generator."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 0xFFFFFFFFFFFFFFFF


def random_keys(count: int, *entropy: int) -> np.ndarray:
    """`count` uint64 keys, a function of the `entropy` integers alone.

    Raw PCG64 output is used because NumPy guarantees that stream for ever (NEP 19), unlike `Generator.permutation`.

    >>> random_keys(2, 0, 1).tolist() == random_keys(2, 0, 1).tolist() != random_keys(2, 0, 2).tolist()
    True
    """
    sequence = np.random.SeedSequence([value & _MASK64 for value in entropy])
    return np.random.PCG64(sequence).random_raw(count)


def permutation(count: int, *entropy: int) -> np.ndarray:
    """(count,) int64: the numbers 0..count-1 in an order that the `entropy` integers fix.

    >>> sorted(permutation(4, 7).tolist())
    [0, 1, 2, 3]
    """
    return np.argsort(random_keys(count, *entropy), kind="stable")


def _mix(state: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _sample_state(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    state = np.full(index.shape, seed & _MASK64, dtype=np.uint64)
    for value in (np.uint64(epoch & _MASK64), index.astype(np.uint64)):
        state = _mix((state ^ value) + np.uint64(_GOLDEN))
    return state


def sample_uniforms(seed: int, epoch: int, index: np.ndarray, count: int) -> np.ndarray:
    """(B, count) float64 in [0, 1): row b depends on (seed, epoch, index[b]) only.

    Args:
        index: (B,) sample numbers.
        count: draws per sample.

    >>> both = sample_uniforms(0, 1, np.array([5, 9]), 3)
    >>> bool((both[1] == sample_uniforms(0, 1, np.array([9]), 3)[0]).all())
    True
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _mix(_sample_state(seed, epoch, np.asarray(index))[:, None] + steps[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@contextlib.contextmanager
def global_generators_kept() -> Iterator[None]:
    """Give `random`, NumPy's legacy generator and torch's CPU generator their states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_global_generators(seed: int, epoch: int, sample: int) -> None:
    """Seed `random`, NumPy and torch's CPU generator for foreign code that draws from them for one sample.

    Call it inside `global_generators_kept`.
    """
    value = int(_sample_state(seed, epoch, np.array([sample]))[0])
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value >> 1)
