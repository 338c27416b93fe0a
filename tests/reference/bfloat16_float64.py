"""bfloat16 by its bits: rounding, the 16-bit remainder of a split fp32 master, Kahan's compensation, neighbours.

Rounding to nearest even is IEEE 754's; a master split into bf16 and 16 bits is FlashOptim's idea (arXiv 2602.23349),
here rounded to nearest, ties away from zero; compensation after Zamirai et al., "Revisiting BFloat16 Training", 2021.
"""

from __future__ import annotations

import numpy as np


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of fp32 numbers, as int64, so that no sum wraps."""
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.int64)


def floats(pattern: np.ndarray) -> np.ndarray:
    """fp32 numbers from bits."""
    return np.ascontiguousarray(pattern & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def nearest_even(x: np.ndarray) -> np.ndarray:
    """fp32 numbers rounded to bf16, ties to even; finite ones only."""
    pattern = bits(x)
    return floats((pattern + 0x7FFF + ((pattern >> 16) & 1)) & 0xFFFF0000)


def split(master: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 -> (bf16 as fp32, remainder): rounded to nearest, ties away from zero; finite ones only."""
    pattern = bits(master)
    upper = (pattern + 0x8000) >> 16
    return floats(upper << 16), (pattern - (upper << 16)).astype(np.int16)


def join(rounded: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    """The fp32 master: (bf16 bits << 16) + remainder."""
    return floats(bits(rounded) + remainder.astype(np.int64))


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bf16 numbers next to x toward zero and away from zero; both x itself where it is one."""
    pattern = bits(x)
    toward = pattern & 0xFFFF0000
    return floats(toward), floats(np.where(pattern == toward, toward, toward + 0x10000))


def kahan_add(rounded: np.ndarray, compensation: np.ndarray, update: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bf16, compensation) after `update` is added; computed in float64, stored as bf16."""
    exact = update.astype(np.float64) + compensation
    new = nearest_even((rounded + exact).astype(np.float32))
    return new, nearest_even((exact - (new.astype(np.float64) - rounded)).astype(np.float32))
