"""Norms and clipping in float64, from their definitions; formats are read from their bits, sums are exact.

Norm: Pascanu, Mikolov and Bengio, ICML 2013, algorithm 1, with torch's factor min(1, max / (norm + 1e-6)). Rows: Brock
et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021, equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def from_bits(bits: np.ndarray, exponent_bits: int, fraction_bits: int) -> np.ndarray:
    """Values of IEEE-like numbers: bfloat16 is (8, 7), float16 (5, 10). `bits`: unsigned integers."""
    bits = bits.astype(np.int64)
    sign = np.where(bits >> (exponent_bits + fraction_bits) & 1, -1.0, 1.0)
    exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = (bits & ((1 << fraction_bits) - 1)).astype(np.float64) / (1 << fraction_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    normal = (1.0 + fraction) * np.exp2((exponent - bias).astype(np.float64))
    value = np.where(exponent == 0, fraction * np.exp2(1.0 - bias), normal)
    value = np.where(exponent == (1 << exponent_bits) - 1, np.where(fraction == 0, np.inf, np.nan), value)
    return sign * value


def total_norm(arrays: Sequence[np.ndarray], p: float) -> float:
    """The p-norm of all elements together. NaN if one is NaN."""
    magnitudes = np.concatenate([np.abs(a.astype(np.float64)).reshape(-1) for a in arrays] or [np.zeros(0)])
    largest = float(magnitudes.max(initial=0.0))
    if math.isinf(p) or largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * math.fsum((magnitudes / largest) ** p) ** (1.0 / p)


def norm_factor(norm: float, max_norm: float) -> float:
    return min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0


def clamped(array: np.ndarray, limit: float) -> np.ndarray:
    wide = array.astype(np.float64)
    return np.where(wide > limit, limit, np.where(wide < -limit, -limit, wide))


def agc(gradient: np.ndarray, weight: np.ndarray, clipping: float, eps: float) -> np.ndarray:
    """The clipped gradient, row by row; a row with a norm that is not finite stays."""
    clipped = gradient.astype(np.float64).copy()
    single = gradient.ndim <= 1
    rows = clipped.reshape(1, -1) if single else clipped
    weights = weight.astype(np.float64).reshape(1, -1) if single else weight.astype(np.float64)
    for row, of_weight in zip(rows, weights, strict=True):
        norm, weight_norm = total_norm([row], 2.0), total_norm([of_weight], 2.0)
        limit = clipping * max(weight_norm, eps)
        if math.isfinite(norm) and math.isfinite(weight_norm) and norm > limit:
            row *= limit / norm
    return clipped
