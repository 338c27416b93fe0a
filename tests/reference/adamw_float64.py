"""AdamW in float64, written from the paper: Loshchilov and Hutter, ICLR 2019, algorithm 2 (lines 5 to 12)."""

from __future__ import annotations

import numpy as np


def adamw_step(
    theta: np.ndarray,
    gradient: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    t: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    clip_coef: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The next (theta, m, v); nothing is changed in place. Arrays of any shape, float64."""
    g = gradient.astype(np.float64) * clip_coef * (-1.0 if maximize else 1.0)
    m = beta1 * m.astype(np.float64) + (1.0 - beta1) * g
    v = beta2 * v.astype(np.float64) + (1.0 - beta2) * g * g
    m_hat = m / (1.0 - beta1**t)
    v_hat = v / (1.0 - beta2**t)
    theta = theta.astype(np.float64)
    return theta - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * theta), m, v
