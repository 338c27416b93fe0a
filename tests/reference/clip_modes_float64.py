"""The gradient clipping of a step in float64: by value, then by tensor or row, then by group or all together.

By norm: Pascanu, Mikolov and Bengio, ICML 2013, algorithm 1, with torch's factor min(1, max / (norm + 1e-6)). By row:
Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021, eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def by_value(gradient: np.ndarray, limit: float) -> np.ndarray:
    return np.clip(gradient, -limit, limit)


def norm(gradients: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in gradients)))


def factor(total: float, limit: float) -> float:
    return min(1.0, limit / (total + 1e-6))


def agc_factors(gradient: np.ndarray, theta: np.ndarray, clipping: float, eps: float = 1e-3) -> np.ndarray:
    """One factor for each row, shaped so that it multiplies the gradient. A tensor of ndim <= 1 is one row."""
    axes = tuple(range(1, gradient.ndim)) if gradient.ndim > 1 else None
    grad_norm = np.sqrt(np.sum(gradient**2, axis=axes, keepdims=True))
    limit = clipping * np.maximum(np.sqrt(np.sum(theta**2, axis=axes, keepdims=True)), eps)
    clipped = grad_norm > limit
    return np.where(clipped, limit / np.where(clipped, grad_norm, 1.0), 1.0)


def clip(
    gradients: Sequence[np.ndarray],
    thetas: Sequence[np.ndarray],
    groups: Sequence[int],
    modes: dict[str, float],
    value: float | None = None,
) -> tuple[list[np.ndarray], float, float]:
    """The clipped gradients, their total norm after `value`, and the smallest factor applied to any of them."""
    out = [g.astype(np.float64) if value is None else by_value(g.astype(np.float64), value) for g in gradients]
    total = norm(out)
    factors: list[np.ndarray] = [np.ones(()) for _ in out]
    if "tensor" in modes:
        factors = [np.array(factor(norm([g]), modes["tensor"])) for g in out]
    if "agc" in modes:
        factors = [agc_factors(g, w.astype(np.float64), modes["agc"]) for g, w in zip(out, thetas, strict=True)]
    once = [g * f for g, f in zip(out, factors, strict=True)]
    last = [1.0 for _ in once]
    if "group" in modes:
        of_group = {n: norm([g for g, k in zip(once, groups, strict=True) if k == n]) for n in groups}
        last = [factor(of_group[n], modes["group"]) for n in groups]
    if "global" in modes:
        last = [factor(norm(once), modes["global"]) for _ in once]
    smallest = min((float(np.min(f)) * x for f, x in zip(factors, last, strict=True) if f.size), default=1.0)
    return [g * x for g, x in zip(once, last, strict=True)], total, smallest
