"""Random numbers as a function of (seed, stage, epoch, step), never of what ran before."""

from __future__ import annotations

from collections.abc import Callable

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(value: int) -> int:
    """One output of SplitMix64 for the state `value` (Steele, Lea, Flood 2014, figure 17). 64 bits.

    >>> hex(splitmix64(0))
    '0xe220a8397b1dcdaf'
    """
    z = (value + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix(*parts: int) -> int:
    """A 64-bit key of some integers; their order counts."""
    key = 0
    for part in parts:
        key = splitmix64(key ^ (part & _MASK))
    return key


def step_seed(key: int, step: int) -> int:
    """The 63-bit seed of one step, from the key of its epoch (`mix(seed, stage, epoch)`)."""
    return splitmix64(key ^ step) >> 1


def make_seeder(device: torch.device) -> Callable[[int], object]:
    """What seeds torch's generators for work on `device`.

    `torch.manual_seed` does the same for every backend there is, at 200 us a call.
    """
    cpu = torch.default_generator
    if device.type == "cpu":
        return cpu.manual_seed
    module = torch.get_device_module(device)

    def seed(value: int) -> None:
        cpu.manual_seed(value)
        module.manual_seed(value)

    return seed
